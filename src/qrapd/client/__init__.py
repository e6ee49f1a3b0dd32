# SPDX-License-Identifier: GPL-2.0-or-later
"""The API as those see it who call it: where its sockets are, questions and answers, and events as they come.

What comes back stays as it came, a mapping made from JSON: an older client shows a newer agent's VMs.
"""
