#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# GET /: what a person sees. httpd runs this where there is no index.html.

. /lib/reply
read -r uptime idle </proc/uptime
read -r host </proc/sys/kernel/hostname
reply "Hello from $host, by $NIC, up for $uptime seconds."
