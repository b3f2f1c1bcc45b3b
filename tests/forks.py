"""A Python that has imported what takes its time, and forks for each command that it is sent: a test's command starts at once.

Each command is the script that pip installed, run in a process of its own in which nothing of ddpm_nb has been imported.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import warnings

TAKE_TIME = (
    "accelerate",
    "matplotlib.pyplot",
    "nbdev.test",
    "scipy.linalg",
    "sklearn.datasets",
    "torch",
    "torch._dynamo",
)


class Forks:
    "The Python that forks, seen from the tests."

    def __init__(self, env):
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
        )

    def run(self, job, timeout):
        "The exit status of a job: argv, cwd, env, stdout, stderr."
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            self.close()
            raise TimeoutError(f"{job['argv']} ran longer than {timeout} seconds")
        return int(self.server.stdout.readline())

    def close(self):
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()


def next_job():
    "Waits for the job that this process, by then a new one, is to do."
    for line in sys.stdin:
        if not (pid := os.fork()):
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


def become(job):
    "This process as the job wants it."
    assert not [m for m in sys.modules if m.startswith("ddpm_nb")]
    for number, file in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[:0] = job["env"].get("PYTHONPATH", "").split(os.pathsep)
    if job["env"].get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    sys.argv[:] = job["argv"]


if __name__ == "__main__":
    sys.path.pop(0)  # the tests' folder
    for name in TAKE_TIME:
        __import__(name)
    become(next_job())
    runpy.run_path(sys.argv[0], run_name="__main__")
