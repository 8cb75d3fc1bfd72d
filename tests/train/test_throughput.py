"""Images a second: lately and in the mean, without the first step of a process."""

from luqrun.train import throughput


def test_the_first_step_is_part_of_the_time_and_not_of_the_mean_speed():
    progress = dict(throughput.START)
    first = throughput.Speed(progress)
    assert first.mean() == 0.0
    first.count(10.0, 50)
    assert (first.mean(), first.lately()) == (0.0, 5.0)
    first.count(1.0, 50)
    first.count(1.0, 150)
    assert (first.mean(), first.lately()) == (100.0, 100.0)
    again = throughput.Speed(progress)  # the next process
    again.count(20.0, 100)
    again.count(2.0, 40)
    assert (again.mean(), again.lately()) == (60.0, 140 / 22)
    assert progress == {"seconds": 34.0, "images": 390, "timed_seconds": 4.0, "timed_images": 240}


def test_a_first_step_that_compiles_is_no_part_of_the_time():
    progress = dict(throughput.START)
    run = throughput.Speed(progress, compiles=True)
    run.count(60.0, 50)
    run.count(1.0, 50)
    assert (progress["seconds"], progress["images"], run.mean()) == (1.0, 100, 50.0)
