"""`python -m train`: compose the configuration, train, say where everything is.

Under `torchrun` every process is one rank; the one that failed, or else rank 0, says why.
"""

from __future__ import annotations

import os
import sys

from safetensors import SafetensorError

from configs.compose import compose, help_text, multirun
from configs.errors import ConfigError
from model.config import ModelConfig

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less is lost to fragments
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 for a mistake in configuration or data (one line), 130 when interrupted."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    try:
        if {"-m", "--multirun"} & set(argv):
            if WORLD > 1:
                raise ConfigError("-m: a sweep is for one process; start its runs one by one under torchrun")
            from train.loop import train

            multirun(argv, train)
        else:
            config = compose(argv, resumed_model(argv))
            from train.loop import train  # torch is imported only for a configuration that is right

            train(config)
    except ConfigError as error:  # raised by every rank, but for those named FailedHere and FailedElsewhere
        says = {"FailedHere": True, "FailedElsewhere": False}.get(type(error).__name__, RANK == 0)
        return failed(str(error)) if says else 2
    except (OSError, SafetensorError) as error:  # a full disk, a folder without permission
        return failed(f"{first_line(error)}; mend it, then go on with resume=auto")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return failed(
            f"{first_line(error)}; use a smaller train.micro_batch, a shorter train.seq_len or more ranks"
        )
    except KeyboardInterrupt:
        return 130
    return 0


def resumed_model(argv: list[str]) -> ModelConfig | None:
    if not any(text.startswith("resume=") for text in argv):
        return None
    from train.resume import model_of_resumed

    return model_of_resumed(argv)


def failed(line: str) -> int:
    print(f"error: {f'rank {RANK}: ' if RANK else ''}{line}", file=sys.stderr, flush=True)
    return 2


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if WORLD > 1 and code:
        os._exit(code)  # other ranks may be waiting for this one: leaving the process group would wait, too
    sys.exit(code)
