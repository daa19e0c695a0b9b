"""One process of a run that `--nproc` started. What it is to do comes as JSON: `spolia.run`'s arguments, and the command."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings

from spolia.core.dist import asked
from spolia.errors import SpoliaError
from spolia.runs import progress, telling, verbs


def main() -> None:
    """Errors are for the process that started this one to tell; its exit code says that there was one."""
    job = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(job.pop("parent"),), daemon=True).start()
    shown, sys.argv[:] = job.pop("progress"), job.pop("command")
    warnings.showwarning = telling.show_warning  # type: ignore[assignment]
    try:
        verbs.run(**job, progress=progress.choose(quiet=shown is None or asked()[0] > 0, json=shown == "json"))
    except KeyboardInterrupt:
        sys.exit(130)
    except SpoliaError as error:
        sys.exit(error.exit_code)
    except Exception:
        sys.exit(1)


def _end_with(parent: int) -> None:
    """Stop as if asked to, once the process that started this one is gone: nobody would tell how it ends."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
