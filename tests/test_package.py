"""The package as a whole: what it offers."""

import hf_attentiondrop


def test_tab_completion_offers_what_the_package_exports() -> None:
    offered = {name for name in dir(hf_attentiondrop) if not name.startswith("__")}
    assert offered == {name for name in hf_attentiondrop.__all__ if not name.startswith("__")}
    assert {"AttentionDropTrainer", "consistency_loss", "set_scheduled_value"} <= offered
    assert {"__doc__", "__version__"} <= set(dir(hf_attentiondrop))
