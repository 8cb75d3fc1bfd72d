"""Examples a second: recently and in the mean, without the first step of a process."""

from luqrun.train import throughput


def test_the_first_step_is_part_of_the_time_and_not_of_the_mean_speed():
    progress = dict(throughput.START)
    first = throughput.Throughput(progress)
    assert first.mean() == 0.0
    first.count(10.0, 50)
    assert (first.mean(), first.take_recent()) == (0.0, 5.0)
    first.count(1.0, 50)
    first.count(1.0, 150)
    assert (first.mean(), first.take_recent()) == (100.0, 100.0)
    again = throughput.Throughput(progress)  # the next process
    again.count(20.0, 100)
    again.count(2.0, 40)
    assert (again.mean(), again.take_recent()) == (60.0, 140 / 22)
    assert progress == {"seconds": 34.0, "trained": 390, "timed_seconds": 4.0, "timed": 240}


def test_a_first_step_that_compiles_is_no_part_of_the_time():
    progress = dict(throughput.START)
    run = throughput.Throughput(progress, compiles=True)
    run.count(60.0, 50)
    run.count(1.0, 50)
    assert (progress["seconds"], progress["trained"], run.mean()) == (1.0, 100, 50.0)
