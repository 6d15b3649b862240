"""`python -m train`: compose the configuration, train, say where everything is.

Under `torchrun` every process is one rank; of those that fail, one says why (train/watch.py).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

from safetensors import SafetensorError

from configs.compose import compose, help_text, multirun
from configs.errors import ConfigError
from data.files import remedy
from model.config import ModelConfig

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less is lost to fragments
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
if WORLD > 1:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # pages of warnings where another rank has gone


def main(argv: list[str]) -> int:
    """Exit code: 0 done, or stopped by SIGTERM or SIGUSR1 and saved; 2 for a mistake in configuration or data
    (one line), 130 when interrupted."""
    if {"-h", "--help"} & set(argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a word
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
    except ConfigError as error:
        return failed(error, str(error))
    except OSError as error:  # a full disk, a folder without permission
        return failed(error, f"{first_line(error)}; {remedy(error)}")
    except SafetensorError as error:
        return failed(error, f"{first_line(error)}; mend it, then go on with resume=auto")
    except KeyboardInterrupt as stop:
        return failed(stop, "", 130)
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            smaller = "use a smaller train.micro_batch, a shorter train.seq_len or more ranks"
            return failed(error, f"{first_line(error)}; {smaller}")
        if WORLD == 1:
            raise
        return failed(error, f"{type(error).__name__}: {first_line(error)}", 1, traceback.format_exc())
    return 0


def resumed_model(argv: list[str]) -> ModelConfig | None:
    if not any(text.startswith("resume=") for text in argv):
        return None
    from train.resume import model_of_resumed

    return model_of_resumed(argv)


def failed(error: BaseException, line: str, code: int = 2, trace: str = "") -> int:
    """Say why the run ends, on one rank of all; returns the exit code."""
    if WORLD > 1:
        from train.watch import speak  # imports torch

        speak(error, line, trace)
    elif line:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if WORLD > 1 and code:
        os._exit(code)  # other ranks may be waiting for this one: leaving the process group would wait, too
    sys.exit(code)
