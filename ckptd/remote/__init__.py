# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls by stopped tasks: batches of calls as data, and their executors, a borrowed task or a stub."""
