# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands, a module for each kind of them, imported when one of its commands is called.

Every start of a VM pays for what is imported here, so what is heavy is imported in the functions that need it.
"""
