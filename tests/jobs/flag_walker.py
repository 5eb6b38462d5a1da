"""Runs one command after the other in a process of its own, as the test of all flags asks for: JSON lines in and out.

In: a list of words a line. Out: exit code or null where the command was still at work when time was up, what was
printed, and the traceback where there is one. Torch and its friends are imported once for all commands.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from typing import Any

MEMORY = 24 * 10**9  # bytes of address space: values that ask for more are to be refused, not to take the machine down


class TimeUpError(BaseException):
    """The command works on happily; other commands have to be tried too."""


def time_up(*_: object) -> None:
    raise TimeUpError


def main() -> None:
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print past Python
    from jobs import cli
    from jobs.run import terminal

    signal.signal(signal.SIGPROF, time_up)
    for line in sys.stdin:
        print(json.dumps(one(json.loads(line), seconds, cli.run, terminal)), file=out, flush=True)


def one(words: list[str], seconds: float, run: Any, terminal: Any) -> dict[str, Any]:
    """What comes of a command."""
    printed, code, trace = io.StringIO(), None, ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        terminal.console.file = terminal.tables.file = printed
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: the machine may be shared
        try:
            code = run(words)
        except SystemExit as ended:
            code = ended.code or 0
        except TimeUpError:
            pass
        except BaseException:
            trace = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return {"code": code, "printed": printed.getvalue()[-2000:], "trace": trace[-4000:]}


if __name__ == "__main__":
    main()
