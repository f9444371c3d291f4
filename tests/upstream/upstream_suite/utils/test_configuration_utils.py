"""Why: test_configuration_common reads these arguments for configs without sub-configs; ours has three."""

config_common_kwargs: dict = {}
