"""An accelerator without one: a step runs on tensors that hold no numbers, so whatever would wait for a value or mix devices fails here."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import pytest
import torch
from tokenizer_items import ada_settings, mmq_settings, noise, tiny_items, training
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import config, device
from pipeline.encoders.sasrec import gather, places
from pipeline.tokenizers import ada_sid, fit, mmq, rq_vae
from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import ENCODE_ROWS_THERE, FitOptions
from pipeline.tokenizers.world import World

NOWHERE = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Fails when an operation reads or makes a tensor with rows anywhere but `NOWHERE`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        held = tree_leaves((args, kwargs or {}, made))
        elsewhere = {str(value.device) for value in held if isinstance(value, torch.Tensor) and value.dim() and value.device != NOWHERE}
        assert not elsewhere, f"{func} meets {elsewhere}"
        return made


@pytest.fixture
def no_autocast(monkeypatch):
    """Tensors without numbers know no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize(
    ("module", "make"),
    [
        (ada_sid, lambda widths: ada_sid.Network(ada_settings(), widths)),
        (ada_sid, lambda widths: ada_sid.Network(ada_settings(form="v2", sparsity="scalar"), widths)),
        (mmq, lambda widths: mmq.Network(mmq_settings(), {name: widths[name] for name in ("text", "image")})),
        (rq_vae, lambda widths: rq_vae.Autoencoder(config.RqVae(codebook_size=12, latent_dim=8, hidden_dims=[16]), widths)),
    ],
)
def test_a_step_waits_for_no_value_and_stays_on_its_device(no_autocast, module, make, quantise):
    items = tiny_items()
    network = make(items.widths()).to(NOWHERE)
    learner, there, noise_BU = module.Training(network), items.to(NOWHERE), noise().to(NOWHERE)
    with OneDevice():
        batch = getattr(network, "inputs", network).prepare(there).take(torch.zeros(96, dtype=torch.int64, device=NOWHERE))
        learner.losses(batch, noise_BU, quantise=quantise, world=World())["total"].backward()
        World().add_gradients(network.parameters())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        learner.after_step()


def test_the_check_sees_a_value_that_is_waited_for():
    with pytest.raises(RuntimeError, match=r"meta|Meta"):
        float(torch.ones((), device=NOWHERE))
    with pytest.raises(AssertionError, match="cpu"), OneDevice():
        torch.arange(3)


def test_places_are_those_of_the_events_that_are_there():
    items_T, start_B, stop_B = torch.arange(20), torch.tensor([0, 3, 3, 10]), torch.tensor([3, 3, 8, 14])
    window_BL = gather(items_T, start_B, stop_B, 5, 99)
    expected = torch.nonzero(window_BL.flatten() != 99).flatten()
    assert torch.equal(places(stop_B - start_B, int((stop_B - start_B).sum()), 5), expected)


def test_a_catalogue_goes_where_it_fits(monkeypatch):
    items = tiny_items()
    assert items.settle("cpu") is not None
    size = sum(value.nbytes for value in vars(items).values() if value is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(size / device.SHARE) - 1, 0))
    assert not device.fits(size, torch.device("cuda"))
    assert device.fits(size - 1, torch.device("cuda"))
    assert device.fits(size, torch.device("cpu"))


def test_an_accelerator_gets_its_own_height_of_blocks(monkeypatch):
    from pipeline.tokenizers import base

    heights = []

    def encode(rows, keep):
        """Notes how many items it is given."""
        heights.append(len(rows))
        zeros = torch.zeros(len(rows), 1)
        return base.TokenizerOutput(codes_NL=zeros.long(), weights_NL=zeros, quantized_ND=zeros)

    assert len(base.encode_in_chunks(tiny_items(), encode, device=NOWHERE).codes_NL) == 96
    assert heights == [ENCODE_ROWS_THERE]


def test_random_state_and_switches_are_put_back():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with device.deterministic(1):
        torch.rand(7)
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_each_kind_of_step_is_recorded_once_and_replayed(monkeypatch):
    made = []

    class Played:
        """Stands for a recording where nothing can record: it takes the step again."""

        def __init__(self, step, batch, noise_BU, quantise):
            made.append((quantise, len(batch)))
            self.step = lambda batch, noise_BU: step(batch, noise_BU, quantise)

        def __call__(self, batch, noise_BU):
            return self.step(batch, noise_BU)

    class Recording(fit.Trainer):
        """The loop as it goes on an accelerator."""

        def run(self):
            self.recording = True
            return super().run()

    states = []
    for loop in (fit.Trainer, Recording):
        monkeypatch.setattr(ada_sid, "Trainer", loop)
        monkeypatch.setattr(fit, "Replay", Played)
        tokenizer = AdaSid(ada_settings())
        tokenizer.fit(tiny_items(), FitOptions(seed=1, settings=training(batch_size=14, max_epochs=8)))  # steps of 14 and of 13
        states.append(tokenizer.state())
    assert sorted(made) == [(False, 13), (False, 14), (True, 13), (True, 14)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_recorded_steps_give_the_bits_of_steps_as_they_come():
    assert device.best_device() == "cuda"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == device.FIXED_WORKSPACE
    items, states = tiny_items(), []
    for recorded in (False, True):
        tokenizer = AdaSid(ada_settings())
        tokenizer.fit(replace(items), FitOptions(seed=1, settings=training(batch_size=8, cuda_graph=recorded)))
        states.append(tokenizer.state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
