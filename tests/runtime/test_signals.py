"""Signals: a note while a step runs, an exception anywhere else, and a run that goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from running import last, metrics, quiet_machine, tiny, train

from luqrun.runs.folder import RunFolder
from luqrun.runtime import signals
from luqrun.runtime.signals import ASKING, Requests, Stopped, call_earlier_handler, handled
from luqrun.tasks.classification.pixels import MemoryImages
from luqrun.train import trainer
from luqrun.train.trainer import Trainer


@pytest.mark.parametrize("number", ASKING)
def test_outside_of_a_step_a_signal_ends_it_at_once(number):
    with pytest.raises(Stopped) as stopped, handled():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number
    assert str(stopped.value) == signal.Signals(number).name


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)])
def test_a_cluster_that_sends_two_signals_gets_its_checkpoint_too(order):
    with handled() as requests, requests.deferred():
        for number in order:
            os.kill(os.getpid(), number)
        assert requests.check() == signal.SIGUSR2
    assert requests.received == signal.SIGUSR2


def test_within_a_step_the_first_waits_and_ctrl_c_after_it_does_not():
    reached = []

    def two_signals():
        with handled() as requests, requests.deferred():
            assert requests.check() is None
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(requests.check())
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("never")

    with pytest.raises(Stopped) as stopped:
        two_signals()
    assert reached == [signal.SIGTERM]
    assert stopped.value.number == signal.SIGINT


def test_handlers_are_given_back():
    before = {number: signal.getsignal(number) for number in ASKING}
    with handled():
        assert all(signal.getsignal(number) != before[number] for number in ASKING)
    assert {number: signal.getsignal(number) for number in ASKING} == before


def test_whoever_handled_a_signal_before_gets_it_too():
    got = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
    try:
        with pytest.raises(Stopped), handled():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert got == []
        assert call_earlier_handler(signal.SIGUSR2)
        assert got == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not call_earlier_handler(signal.SIGUSR2)
    assert not call_earlier_handler(signal.SIGINT)  # Python's own handler is nobody


def test_another_thread_than_the_main_one_gets_none():
    found = []

    def work():
        with handled() as requests:
            found.append((requests.check(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


@pytest.mark.parametrize(
    ("name", "call", "step"),
    [("train_step", 5, 5), ("train_step", 8, 8), ("evaluate", 1, 8), ("train_step", 11, 11)],
    ids=["mid-epoch", "last step", "evaluation", "fine-tune"],
)
def test_a_run_that_is_asked_to_stop_writes_where_it_is(tmp_path, monkeypatch, trained, name, call, step):
    """Eight steps an epoch; the run that goes on afterwards equals the one that never stopped."""
    overrides = ("finetune=fnt1", "tracking.histogram_every=5")
    whole = trained(*overrides)
    owner = trainer if name == "evaluate" else Trainer
    original, calls, requests = getattr(owner, name), [], Requests()

    def asked(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            requests.handle(signal.SIGUSR1, None)
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, asked)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(Stopped, match="SIGUSR1"), quiet_machine():
        trainer.run(tiny(*overrides), folder, requests)
    assert last(folder)["progress"]["step"] == step
    assert folder.summary() is None
    assert len(calls) == call  # nothing after it
    monkeypatch.undo()
    _, resumed = train(tmp_path / "run", *overrides)
    assert metrics(resumed) == metrics(whole)


@pytest.mark.parametrize("number", ASKING)
def test_a_read_that_does_not_end_does_after_a_signal(tmp_path, monkeypatch, number):
    monkeypatch.setattr(signals, "READING", 0.1)
    os.mkfifo(tmp_path / "pipe")
    saved = []

    def read():
        with handled() as requests, requests.deferred(), requests.reading(lambda: saved.append(requests.check())):
            threading.Timer(0.1, os.kill, [os.getpid(), number]).start()
            (tmp_path / "pipe").read_bytes()

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Stopped) as stopped:
        read()
    assert (stopped.value.number, saved) == (number, [number])
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_read_that_ends_in_time_lets_the_step_end():
    with handled() as requests, requests.deferred():
        with requests.reading(pytest.fail):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGALRM)  # which the timer may send just then: the step goes on
        assert requests.check() == signal.SIGTERM


def test_a_run_that_is_blocked_in_a_read_writes_where_it_is(tmp_path, monkeypatch, trained):
    """It is asked to stop while the fifth batch does not come, and goes on as if nothing had been."""
    monkeypatch.setattr(signals, "READING", 0.1)
    served, original = [], MemoryImages.batch
    os.mkfifo(tmp_path / "pipe")

    def blocked(self, indices, keys):
        served.append(1)
        if len(served) == 5:
            threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
            (tmp_path / "pipe").read_bytes()
        return original(self, indices, keys)

    whole = trained("quant=fp32")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryImages, "batch", blocked)
        with pytest.raises(Stopped), quiet_machine(), handled() as requests:
            trainer.run(tiny("quant=fp32"), folder, requests)
    assert last(folder)["progress"]["step"] == 4
    _, resumed = train(tmp_path / "run", "quant=fp32")
    assert metrics(resumed) == metrics(whole)


def test_under_torchrun_a_signal_and_its_echo_are_one():
    requests = Requests(burst=60)
    with requests.deferred():
        requests.handle(signal.SIGINT, None)
        requests.handle(signal.SIGTERM, None)
        assert requests.check() == signal.SIGINT
        requests.since -= 61
        with pytest.raises(Stopped):
            requests.handle(signal.SIGINT, None)


DEAF = """
import hashlib, sys, threading, luqrun.runtime.signals as stopping
stopping.PATIENCE = 0.1
try:
    with stopping.handled() as requests, requests.deferred():
        # Not before the hash has begun: a signal that Python handles in time ends nothing.
        threading.Timer(0.5, print, ["ready"], {"flush": True}).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))  # in C, where Python handles no signal
        sys.exit(requests.check())
finally:
    print("heard", flush=True)
"""


@pytest.mark.parametrize("alive", [True, False], ids=["all alive", "one died"])
def test_under_torchrun_a_process_that_cannot_listen_ends_if_another_died(alive):
    """Its siblings are the children of this process: one at least, fewer than a million."""
    rounds, processes = (5_000_000, 1) if alive else (2**31 - 1, 10**6)  # of a hash: seconds, or many minutes
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "a test's", "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", DEAF, str(rounds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        process.stdout.readline()
        process.terminate()
        try:
            assert process.wait(100) == (signal.SIGTERM if alive else 128 + signal.SIGTERM)
            assert process.stdout.read() == ("heard\n" if alive else "")
        finally:
            process.kill()
