"""Kernels are interpreted only if TRITON_INTERPRET=1 was set before their import, and then cannot be compiled.

So ``interpreted/`` runs in a process of its own, which ``test_interpreter.py`` starts; elsewhere it is not collected.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
