"""The configuration: values in YAML, composed by Hydra, typed and checked by the dataclasses they fill."""
