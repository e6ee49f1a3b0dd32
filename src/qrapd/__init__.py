# SPDX-License-Identifier: GPL-2.0-or-later
"""qrapd runs QEMU virtual machines networked by passt, and keeps that network alive."""

__all__ = ["__version__"]

__version__ = "0.1.0"
