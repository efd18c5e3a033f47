"""The pretend CUDA machine refuses what CUDA refuses, and its graphs do what graphs do."""

import copy
import warnings

import numpy as np
import pytest
import torch
from pretend_cuda import CaptureError, Machine


@pytest.fixture
def machine():
    with Machine() as machine:
        yield machine


def captured(step, *generators, warm=True, **options):
    """A graph of a function, run once before as it should be."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    if warm:
        step()
    with torch.cuda.graph(graph, **options):
        out = step()
    return graph, out


def test_tensors_say_where_they_are(machine):
    x = torch.arange(6.0).view(2, 3).to("cuda")
    assert x.is_cuda and not x.is_cpu and str(x.device) == "cuda:0" and x.get_device() == 0
    assert str((x @ x.T).device) == str(x.new_zeros(2).device) == str(torch.zeros(2, device="cuda").device) == "cuda:0"
    assert str(torch.zeros(2, device="cuda:1").device) == "cuda:1"
    assert x.cpu().is_cpu and x.to("cuda") is x and x.to("cuda:1") is not x and x.to(torch.float64) is not x
    assert x.cpu().tolist() == x.tolist() == [[0, 1, 2], [3, 4, 5]] and float(x.sum()) == 15
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        x.to("cuda:2")


def test_outside_there_is_no_cuda():
    before = torch.Generator, torch.cuda.Stream, torch.cuda.is_available()
    with Machine():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    assert (torch.Generator, torch.cuda.Stream, torch.cuda.is_available()) == before


def test_devices_do_not_mix(machine):
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    for one, other in ((x, y), (y, x), (x, y.to("cuda:1"))):
        with pytest.raises(RuntimeError, match="same device"):
            one + other
    with pytest.raises(RuntimeError, match="same device"):
        x[torch.zeros(2, dtype=torch.long)] = y[:2]
    assert str((x + torch.tensor(2.0)).device) == "cuda:0"  # numbers may be on the host
    with pytest.raises(RuntimeError, match="same device"):
        y[torch.zeros(1, dtype=torch.long, device="cuda")]


def test_generators_belong_to_a_device(machine):
    ours, hosts = torch.Generator("cuda").manual_seed(0), torch.Generator().manual_seed(0)
    assert str(ours.device) == "cuda:0" and isinstance(None, torch.Generator | None)
    drawn = torch.empty(4, device="cuda").normal_(generator=ours)
    assert torch.equal(drawn.cpu(), torch.empty(4).normal_(generator=hosts))
    with pytest.raises(RuntimeError, match="generator"):
        torch.empty(4, device="cuda").normal_(generator=hosts)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randperm(4, generator=ours)
    assert torch.randn(3, generator=ours, device="cuda").is_cuda


def test_nothing_turns_into_numpy_by_itself(machine):
    x = torch.ones(3, device="cuda")
    for turn in (lambda: x.numpy(), lambda: np.asarray(x), lambda: np.sum([x, x])):
        with pytest.raises(TypeError, match="to numpy"):
            turn()
    assert x.cpu().numpy().sum() == 3


def test_training_gives_the_numbers_of_the_host(machine):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        network = copy.deepcopy(network.to(device))
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        for i in range(3):
            x = torch.arange(20.0).view(5, 4).sin().to(device) + i
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
        assert all(parameter.grad.device == parameter.device for parameter in network.parameters())
        results.append([value.cpu() for value in network.state_dict().values()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_copy_arrives_when_it_is_waited_for(machine):
    x, place = torch.ones(3, device="cuda"), torch.empty(3, pin_memory=True)
    place.copy_(x, non_blocking=True)
    x.zero_()  # in the order of the stream: this comes after the copy
    assert place.isnan().all()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert place.tolist() == [1, 1, 1]
    place.copy_(x + 5, non_blocking=True)
    torch.cuda.synchronize()
    assert place.tolist() == [5, 5, 5]
    plain = torch.empty(3)
    plain.copy_(x, non_blocking=True)  # memory that is not pinned waits, whatever it is told
    assert plain.tolist() == [0, 0, 0]


def test_waits_are_counted_and_may_be_errors(machine):
    x = torch.arange(4.0, device="cuda")
    for ask in (lambda: float(x.sum()), lambda: x.nonzero(), lambda: x[x > 1], lambda: x.cpu(), lambda: x.tolist()):
        before = len(machine.waits)
        ask()
        assert len(machine.waits) > before
    index = torch.tensor([1], device="cuda")
    before = len(machine.waits)
    (x * 2 + x[index]).sum()
    assert len(machine.waits) == before
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.cpu()
    torch.cuda.set_sync_debug_mode("default")


def test_memory_is_that_of_living_tensors(machine):
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    y = x.view(10, 100)
    assert torch.cuda.memory_allocated() - before == 4000
    del x
    assert torch.cuda.memory_allocated() - before == 4000
    del y
    assert torch.cuda.memory_allocated() == before


# graphs -----------------------------------------------------------------------------------------------------------


def test_a_graph_runs_when_it_is_replayed(machine):
    x, total = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")

    def step():
        h = (x * 2).unsqueeze(0).squeeze_(0)
        return total.add_(h.sum())

    graph, out = captured(step)
    assert float(total) == 6  # only the run before the capture
    for _ in range(2):
        graph.replay()
    assert float(total) == float(out) == 18 and machine.n_captures == 1 and machine.n_replays == 2
    x.fill_(10)  # it reads the memory, not the values
    graph.replay()
    assert float(out) == 78
    assert graph.n_kernels == 3


def test_results_of_a_capture_are_no_results(machine):
    x = torch.ones(3, device="cuda")
    graph, out = captured(lambda: x + 1)
    assert out.isnan().all()
    graph.replay()
    assert out.tolist() == [2, 2, 2]


def test_a_graph_draws_on_from_its_generator(machine):
    noise = torch.Generator("cuda").manual_seed(0)
    graph, out = captured(lambda: torch.empty(2, device="cuda").normal_(generator=noise), noise)
    graph.replay()
    expected = torch.Generator().manual_seed(0)
    first, second = (torch.empty(2).normal_(generator=expected) for _ in range(2))
    assert torch.equal(out.cpu(), second) and not torch.equal(first, second)
    assert torch.equal(noise.get_state(), expected.get_state())


def test_running_statistics_move_once_per_replay(machine):
    norm = torch.nn.BatchNorm1d(2, momentum=0.5).to("cuda")
    x = torch.tensor([[0.0, 2.0], [2.0, 4.0]], device="cuda")
    graph, _ = captured(lambda: norm(x), warm=False)
    assert norm.running_mean.tolist() == [0, 0]
    graph.replay()
    assert norm.running_mean.tolist() == [0.5, 1.5]


BAD = {
    "a number for the host": lambda x: float(x.sum()),
    "a shape for the host": lambda x: x[x > 0],
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: x + torch.ones(3).to("cuda"),
    "a number from the host": lambda x: x + torch.tensor(2.0),
    "a strange generator": lambda x: x.normal_(generator=torch.Generator("cuda")),
    "a wait": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_may_not_be_captured(machine, bad):
    x, noise = torch.ones(3, device="cuda"), torch.Generator("cuda")
    with pytest.raises(CaptureError):
        captured(lambda: bad(x.mul_(2)), noise, warm=False)
    assert x.tolist() == [1, 1, 1]  # nothing has run
    assert machine.capturing is None
    with pytest.raises(RuntimeError, match="Offset increment"):  # what a spoilt capture leaves behind
        x.normal_(generator=noise)
    captured(lambda: x + 1)


def test_a_capture_that_runs_out_of_memory(machine):
    x = torch.ones(3, device="cuda")
    machine.fail_after = 1
    with pytest.raises(torch.OutOfMemoryError):
        captured(lambda: x.mul_(2).mul_(3), warm=False)
    assert x.tolist() == [1, 1, 1]


def test_a_graph_belongs_to_the_current_device(machine):
    x = torch.ones(3, device="cuda:1")
    with pytest.warns(UserWarning, match="empty"):
        captured(lambda: x.mul_(2), warm=False)
    assert x.tolist() == [2, 2, 2]  # it ran there and then
    with torch.cuda.device("cuda:1"):
        graph, _ = captured(lambda: x.mul_(2), warm=False, stream=torch.cuda.Stream())
        assert x.tolist() == [2, 2, 2] and graph.n_kernels == 1
    assert torch.cuda.current_device() == 0
    graph.replay()
    assert x.tolist() == [4, 4, 4]


def test_a_capture_wants_a_stream_of_its_own(machine):
    with pytest.raises(CaptureError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()


def test_torch_of_another_day(machine):
    machine.register_warns = True
    with warnings.catch_warnings(), pytest.raises(FutureWarning):
        warnings.simplefilter("error")
        torch.cuda.CUDAGraph().register_generator_state(torch.Generator("cuda"))
