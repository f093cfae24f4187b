"""Runs commands in forked children: processes of their own, as a user's are, without paying for the imports each time.

Reads one JSON job a line on stdin and answers with the exit code of ``lit-reduce WORDS``.
"""

import json
import os
import resource
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import lit_reduce.commands.compare
import lit_reduce.commands.evaluate
import lit_reduce.commands.predict
from lit_reduce import cli

PRELOADED = (AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor, lit_reduce)


def child(job: dict) -> int:
    """The rest of this process's life is one command."""
    os.chdir(job["cwd"])
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    return cli.main(job["words"])


print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = child(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the slow end of an interpreter that holds all of torch
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
