# SPDX-License-Identifier: LGPL-2.1-or-later
"""Linux interfaces with Python types: kernel names, no policy, no logging, no asyncio."""
