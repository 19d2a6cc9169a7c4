"""Trainings of Learning-to-Cache's routers that take a moment, and the states that they see."""

import torch
from diffusers import DDIMScheduler

import stepgraph as sg
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.routers.router import Router
from stepgraph.compiler.routers.router_settings import settings_of
from stepgraph.compiler.routers.router_states import Conditioning, Sampling, Trajectories

SMALL = settings_of("quick", {"iterations": 6, "batch": 8, "pool": 8})


def train(model, scheduler=None, steps: int = 4, settings=SMALL, **options) -> Router:
    return sg.train_router(model, scheduler or DDIMScheduler(), steps=steps, settings=settings, **options)


def sampling(model, steps: int = 4) -> Sampling:
    return Sampling(TracedModel(model), DDIMScheduler(), steps, sg.example_inputs(model))


def trajectories(model, size: int, steps: int = 4, batch: int = 4, dropout: float = 0.0, seed: int = 0) -> Trajectories:
    how = sampling(model, steps)
    pool = Conditioning.of_pool(how, None, size, dropout)
    return Trajectories(how, pool, size, batch, dropout, torch.Generator().manual_seed(seed))
