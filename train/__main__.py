"""`python -m train`: compose the configuration, train, say where everything is."""

from __future__ import annotations

import sys

from safetensors import SafetensorError

from configs.compose import compose, help_text, multirun
from configs.errors import ConfigError


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 for a mistake in configuration or data (one line), 130 when interrupted."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    try:
        if {"-m", "--multirun"} & set(argv):
            from train.loop import train

            multirun(argv, train)
        else:
            config = compose(argv)
            from train.loop import train  # torch is imported only for a configuration that is right

            train(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:  # a full disk, a folder without permission
        print(f"error: {str(error).splitlines()[0]}; mend it, then go on with resume=auto", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        print(
            f"error: {str(error).splitlines()[0]}; try a smaller model or train.micro_batch", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
