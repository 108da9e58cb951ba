"""What a run ran on."""

import json

import torch

from entangle_fast.machine import machine_info


def test_machine_info():
    info = machine_info()
    assert set(info) == {"machine", "versions", "commit"}
    assert info["machine"]["cores"] >= 1 and info["machine"]["cpu"] and info["versions"]["torch"] == torch.__version__
    json.dumps(info)
