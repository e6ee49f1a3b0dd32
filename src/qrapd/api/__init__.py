# SPDX-License-Identifier: GPL-2.0-or-later
"""The API of a host's VMs, over HTTP on a UNIX socket. The application is made in :mod:`qrapd.api.app`.

Importing this costs nothing; what is heavy (Starlette, uvicorn) is imported by `app` and `protocol`, which a supervisor
of one VM does when somebody calls for the first time.
"""
