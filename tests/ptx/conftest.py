import os

collect_ignore = ["test_machine.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
