"""Names that users import by module stay where they are."""

import importlib

import pytest

NAMES = {
    "stepgraph.plan": """Action CachePlan PlanHeader Site PlanError Forecast Increment COMPUTE REUSE LOWRANK FORECAST DEAD
        READS_STORED REPLACED MODULE_KINDS STREAM_KINDS KINDS DTYPES BRANCHES LARGEST POSSIBLE
        FORMAT VERSION first_live containers joint_calls canonical""",
    "stepgraph.config": "BACKENDS SLOT_DTYPES CompileConfig CompileError",
    "stepgraph.ops": """REFERENCE PRIORITY PACKAGES OPS INTO LIBRARY CompileError OpError Provider Op forced load_providers
        rows lowrank_input lowrank_delta modulated_norm gated_residual linear_combination""",
    "stepgraph.env": "VARIABLES PROVIDERS Env read_env get_logger",
    "stepgraph.fingerprint": """has_data config_of hash_config tensor_digest fingerprint dtype_name model_dtype
        refuse_other_model""",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_found(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_every_name_of_the_face_is_there():
    import stepgraph

    assert [name for name in stepgraph.__all__ if not hasattr(stepgraph, name)] == []
    assert callable(importlib.import_module("stepgraph.cli.main").main)
