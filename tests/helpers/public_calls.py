"""A valid call of every public function, on the tiny DiT, and the list of the functions, which is read off the package."""

import enum
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import stepgraph as sg
from helpers.pipes import tiny_pipe
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph import fingerprint, ops
from stepgraph.compiler.planning.list_policies import PolicyRecord
from stepgraph.compiler.planning.sweep_result import Sweep
from stepgraph.plan import Forecast, Increment, canonical, containers, first_live, joint_calls
from stepgraph.plan.report import PlanSummary

MODULES = ("plan", "config", "fingerprint", "ops", "env")
# What public functions return, with methods of their own.
RESULTS = {"Sweep": Sweep, "PlanSummary": PlanSummary, "PolicyRecord": PolicyRecord}
STEPS = 4


def public_functions() -> dict[str, Callable[..., Any]]:
    """All functions, constructors and methods with parameters that the package and its documented modules offer, by name."""
    functions: dict[str, Callable[..., Any]] = {}
    for name in sg.__all__:
        _add(functions, name, getattr(sg, name))
    for short in MODULES:
        module = importlib.import_module(f"stepgraph.{short}")
        for name, value in vars(module).items():
            here = getattr(value, "__module__", "") == module.__name__ or name in getattr(module, "__all__", ())
            if callable(value) and not name.startswith("_") and name not in sg.__all__ and (here or isinstance(value, ops.Op)):
                _add(functions, f"{short}.{name}", value)
    for name, kind in RESULTS.items():
        _add(functions, name, kind, constructor=False)
    return functions


def _add(functions: dict[str, Callable[..., Any]], name: str, value: Any, constructor: bool = True) -> None:
    if not inspect.isclass(value):
        if inspect.signature(value).parameters:
            functions[name] = value
        return
    if issubclass(value, BaseException):
        return
    if constructor and (inspect.signature(value).parameters or issubclass(value, enum.Enum)):
        functions[name] = value
    for method in dir(value):
        static = inspect.getattr_static(value, method)
        ours = any(method in vars(base) and base.__module__.startswith("stepgraph") for base in value.__mro__)
        if (
            ours
            and (method == "__call__" or not method.startswith("_"))
            and isinstance(static, (classmethod, staticmethod, type(_add)))
        ):
            bound = [p for p in inspect.signature(getattr(value, method)).parameters if p != "self"]
            if bound:
                functions[f"{name}.{method}"] = getattr(value, method)


class World:
    """What valid calls share, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.scheduler = tiny_dit(), tiny_scheduler("ddim")

    def plan_of(self, actions: Mapping[str, str], **options: Any) -> sg.CachePlan:
        """A manual plan."""
        return sg.make_plan("manual", model=self.model, scheduler=self.scheduler, steps=STEPS, actions=actions, **options)

    @cached_property
    def plan(self) -> sg.CachePlan:
        return self.plan_of({"attn": "CRCR"})

    @cached_property
    def stats(self) -> sg.CalibrationStats:
        return sg.calibrate(self.model, self.scheduler, steps=STEPS, samples=1)

    @cached_property
    def covariances(self) -> sg.Covariances:
        return sg.measure_covariances(self.model, self.scheduler, steps=STEPS, samples=1, period=2, whole=True)

    @cached_property
    def factors(self) -> sg.Factors:
        return sg.factorize(self.model, method="svd", rank=2)

    @cached_property
    def router(self) -> sg.Router:
        sites = tuple(site for site in self.plan.sites if site.kind in ("attn", "ff"))
        return sg.Router(self.plan.header, sites, torch.zeros(STEPS, len(sites)))

    @cached_property
    def executable(self) -> sg.Executable:
        return sg.compile(self.model, self.plan, inputs(2), backend="eager")

    @cached_property
    def forecasting(self) -> sg.Executable:
        return sg.compile(self.model, sg.forecast(self.plan_of({"attn": "CCCR"})), inputs(1), backend="eager")

    @cached_property
    def pipe(self) -> Any:
        return tiny_pipe(self.model)

    @cached_property
    def sweep(self) -> Sweep:
        return sg.sweep(
            "interval", model=self.model, scheduler=self.scheduler, knob="every", values=[2], steps=STEPS, samples=1
        )

    def saved(self, name: str, record: Any) -> Path:
        """The file of something that saves itself."""
        path = self.folder / name
        if not path.exists():
            record.save(path)
        return path

    def others(self) -> dict[str, Any]:
        """Valid things that belong to something else."""
        model = tiny_dit(num_layers=1)
        plan = sg.make_plan("full", model=model, scheduler=self.scheduler, steps=2, guidance="separate")
        return {
            "another model": model, "another model's plan": plan,
            "another's factors": sg.factorize(model, method="svd", rank=1),
            "another scheduler": tiny_scheduler("euler"), "a stochastic scheduler": _ancestral(), "a plan": self.plan,
            "the scheduler": self.scheduler, "the model": self.model, "statistics": self.stats, "a header": self.plan.header,
            "sites": self.plan.sites, "an executable": self.executable, "a path": self.folder / "written",
            "a path of a picture": self.folder / "written.png", "a plan file": self.saved("plan.json", self.plan),
        }  # fmt: skip


def _ancestral() -> Any:
    import diffusers

    return diffusers.EulerAncestralDiscreteScheduler()


def detached(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that attaches an executable, which is detached again."""

    def called(**arguments: Any) -> Any:
        executable = function(**arguments)
        executable.detach()
        return type(executable)

    return called


def valid_calls(world: World) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Name -> the function and arguments that it takes; what they leave out has its default."""
    w, model, scheduler, plan = world, world.model, world.scheduler, world.plan
    exe, stats, cov, factors = world.executable, world.stats, world.covariances, world.factors
    both = {"model": model, "scheduler": scheduler}
    picture, header = w.folder / "picture.png", {name: getattr(plan.header, name) for name in plan.header.__dataclass_fields__}
    runs = {"samples": 1, "seed": 0, "guidance_scale": 1.0, "conditioning": labels(3)}
    path = cov_path = next(iter(cov.inputs))
    x, b, y = torch.randn(2, 4, 8), torch.randn(3, 8), torch.randn(2, 4, 8)
    modulation, numbers = torch.randn(2, 8), torch.tensor([0.5, 0.5])
    called = inputs(2)

    accelerated = {
        "pipe": w.pipe, "steps": 2, "policy": "interval", "arguments": {"every": 2}, "backend": "eager", "cache": w.folder,
    }  # fmt: skip

    def session(**arguments: Any) -> Any:
        return exe.session()(**arguments)

    def run_through(**arguments: Any) -> Any:
        run, begin = exe.session(**arguments), arguments.get("begin", 0)
        for _ in range(STEPS - begin):
            assert not run.finished
            run(**called)
        assert run.finished
        return run

    def attached(**arguments: Any) -> Any:
        w.pipe.scheduler.set_timesteps(STEPS)
        exe.attach(w.pipe)
        try:
            return w.pipe.transformer(**arguments)
        finally:
            exe.detach()

    def begun() -> sg.Session:
        run = exe.session()
        run(**called)
        return run

    policies = {
        f"make_plan {name}": (sg.make_plan, {"policy": name, "stats": stats, **both, **arguments})
        for name, arguments in policy_arguments(w).items()
    }
    # Clipped samples are no straight line in the output, which its fit needs.
    policies["make_plan whole-step"][1].update(stats=None, steps=STEPS, scheduler=tiny_scheduler("dpm++"))
    return policies | {
        "Action": (sg.Action, {"value": "C"}),
        "CachePlan": (
            sg.CachePlan,
            {"header": plan.header, "sites": plan.sites, "rows": plan.rows, "forecasts": {}, "increments": {}},
        ),
        "CachePlan.action": (plan.action, {"step": 1, "site": plan.sites[0].name}),
        "CachePlan.build": (sg.CachePlan.build, {"header": plan.header, "sites": plan.sites, "actions": {"attn": "CRCR"}}),
        "CachePlan.from_json": (sg.CachePlan.from_json, {"text": plan.to_json()}),
        "CachePlan.index": (plan.index, {"site": plan.sites[0].name}),
        "CachePlan.load": (sg.CachePlan.load, {"path": w.saved("plan.json", plan)}),
        "CachePlan.plot": (plan.plot, {"path": picture}),
        "CachePlan.resample": (plan.resample, {"steps": 6, "scheduler": scheduler}),
        "CachePlan.save": (plan.save, {"path": w.folder / "written.json"}),
        "CachePlan.tail": (plan.tail, {"begin": 2}),
        "CachePlan.with_header": (plan.with_header, {"seed": 3}),
        "CalibrationStats": (sg.CalibrationStats, {name: getattr(stats, name) for name in stats.__dataclass_fields__}),
        "CalibrationStats.load": (sg.CalibrationStats.load, {"path": w.saved("stats.safetensors", stats)}),
        "CalibrationStats.of_branch": (stats.of_branch, {"name": "cond"}),
        "CalibrationStats.plot": (stats.plot, {"path": picture}),
        "CalibrationStats.rate": (stats.rate, {"metric": "v1"}),
        "CalibrationStats.save": (stats.save, {"path": w.folder / "written.safetensors"}),
        "CompileConfig": (sg.CompileConfig, {"backend": "eager", "exact": False, "hoist_limit_mb": 1.0, "slot_dtype": None}),
        "Covariances": (sg.Covariances, {name: getattr(cov, name) for name in cov.__dataclass_fields__}),
        "Covariances.cross": (cov.cross, {"site": "transformer_blocks.0.attn1"}),
        "Covariances.directions": (cov.directions, {"path": cov_path}),
        "Covariances.load": (sg.Covariances.load, {"path": w.saved("covariances.safetensors", cov)}),
        "Covariances.matrix": (cov.matrix, {"path": path}),
        "Covariances.name_of": (cov.name_of, {"path": path}),
        "Covariances.save": (cov.save, {"path": w.folder / "written.safetensors"}),
        "Executable.attach": (detached(exe.attach), {"pipe": w.pipe}),
        "Executable.export": (exe.export, {"path": w.folder / "graph", "format": "graph", "force": True}),
        "Executable.on": (exe.on, {"model": model}),
        "Executable.print_readable": (exe.print_readable, {"step": 1}),
        "Executable.program": (exe.program, {"inputs": inputs(2), "begin": 0}),
        "Executable.save": (exe.save, {"path": w.folder / "written.zip", "with_weights": True, "scheduler": scheduler}),
        "Executable.warm_up": (exe.warm_up, {"scheduler": scheduler, "guidance_scale": 1.0}),
        "Executable.session": (run_through, {"capture": False, "begin": 1, "timesteps": list(plan.header.timesteps[1:])}),
        "Factors": (sg.Factors, {name: getattr(factors, name) for name in factors.__dataclass_fields__}),
        "Factors.load": (sg.Factors.load, {"path": w.saved("factors.safetensors", factors)}),
        "Factors.merge": (factors.merge, {"other": replace(factors, maps={}, errors={})}),
        "Factors.parse": (sg.Factors.parse, {"data": w.saved("factors.safetensors", factors).read_bytes(), "where": "here"}),
        "Factors.refuse_other": (factors.refuse_other, {"model": model}),
        "Factors.save": (factors.save, {"path": w.folder / "written.safetensors"}),
        "Factors.with_affine": (factors.with_affine, {"affine": {"stack_residual/1": torch.zeros(2, 32)}}),
        "PlanHeader": (sg.PlanHeader, header),
        "Router": (sg.Router, {name: getattr(w.router, name) for name in w.router.__dataclass_fields__}),
        "Router.export": (w.router.export, {"path": w.folder / "written.pt"}),
        "Router.load": (sg.Router.load, {"path": w.saved("router.safetensors", w.router)}),
        "Router.refuse_other": (w.router.refuse_other, {"header": plan.header, "what": "these"}),
        "Router.reused": (w.router.reused, {"theta": 0.5}),
        "Router.save": (w.router.save, {"path": w.folder / "written.safetensors"}),
        "RouterSettings": (sg.RouterSettings, {"lam": 0.1, "clamp": None, "loss": "mean", "run": 1}),
        "Session.__call__": (session, {**called, "return_dict": False}),
        "Session.stored": (lambda **a: begun().stored(**a), {"branch": 0}),
        "Session.use_constant": (
            lambda **a: w.forecasting.session().use_constant(**a),
            {"step": 3, "branch": 0, "number": 0, "coefficients": numbers},
        ),
        "Session.use_memory": (lambda **a: exe.session().use_memory(**a), {"memory": {}}),
        "Session.use_tables": (lambda **a: exe.session().use_tables(**a), {"tables": [None]}),
        "Site": (sg.Site, {"path": "blocks.0", "kind": "block", "call": 0, "output": 0, "macs": 1, "bytes": 4}),
        "Sweep.fewer_steps_error": (w.sweep.fewer_steps_error, {"macs": 1e6}),
        "Sweep.plot": (w.sweep.plot, {"path": picture}),
        "accelerate": (
            detached(sg.accelerate),
            accelerated,
        ),
        "accelerate a call": (
            detached(sg.accelerate),
            {**accelerated, "call": {"class_labels": [1], "num_inference_steps": 2, "output_type": "latent"}},
        ),
        "watch": (lambda pipe, **call: sg.watch(pipe, **call), {"pipe": w.pipe, "class_labels": [1], "num_inference_steps": 2}),
        "calibrate": (
            sg.calibrate,
            {**both, "steps": 2, **runs, "inputs": None, "lags": 1, "eta": 0.0, "schedule": {"begin": 0}},
        ),
        "compile": (
            sg.compile,
            {"model": model, "plan": plan, "example_inputs": inputs(2), "backend": "eager", "hoist_limit_mb": 1.0},
        ),
        "example_inputs": (sg.example_inputs, {"model": model, "batch": 2, "conditioning": labels(1, 2)}),
        "factorize": (
            sg.factorize,
            {"model": model, "source": cov, "method": "cov", "rank": 2, "kinds": ["attn"], "shrinkage": 0.1, "chunk": 8},
        ),
        "fit_forecast": (sg.fit_forecast, {"plan": plan, **both, "terms": ("y1",), "kinds": ["attn"], **runs, "ridge": 1e-10}),
        "fit_whole_step": (
            sg.fit_whole_step,
            {"plan": w.plan_of({"output": "CRCR"}), **both, "terms": ("y1", "x0"), **runs, "target": "full"},
        ),
        "forecast": (sg.forecast, {"plan": plan, "rule": "taylor", "order": 1, "kinds": ["attn"]}),
        "import_plan": (sg.import_plan, {"path": _smoothcache(w.folder), **both, "steps": STEPS, "schedule": None}),
        "load": (sg.load, {"path": w.saved("artifact.zip", exe), "model": model, "device": "cpu", "verify": False}),
        "lowrank": (sg.lowrank, {"plan": plan, "kinds": ["attn"], "around": "taylor", "order": 1}),
        "make_plan": (
            sg.make_plan,
            {"policy": "interval", **both, "steps": STEPS, "guidance": "batched", "conditioning": labels(3), "every": 2},
        ),
        "measure_covariances": (
            sg.measure_covariances,
            {**both, "steps": 2, **runs, "period": 2, "kinds": ["attn"], "sketch": 4},
        ),
        "residual_affine": (sg.residual_affine, {"plan": w.plan_of({"stack_residual": "CRCR"}), **both, **runs}),
        "sample": (
            sg.sample,
            {
                "runner": exe,
                "scheduler": scheduler,
                "noise": noise(1),
                "guidance_scale": 2.0,
                "schedule": None,
                "eta": 0.0,
                **labels(3),
                "negative_class_labels": torch.tensor([NULL_CLASS]),
            },
        ),
        "sample with a model": (
            sg.sample,
            {"runner": model, "scheduler": scheduler, "noise": noise(1), "steps": 2, **labels(3)},
        ),
        "compile with factors": (
            sg.compile,
            {"model": model, "plan": sg.lowrank(plan), "example_inputs": inputs(2), "backend": "eager", "factors": factors},
        ),
        "sweep": (
            sg.sweep,
            {"policy": "interval", **both, "knob": "every", "values": [2], "steps": 2, "samples": 1, "batch": 1},
        ),
        "train_router": (
            sg.train_router,
            {**both, "steps": 2, "settings": sg.RouterSettings(iterations=1, batch=1, pool=1, states="trajectory"), "every": 1},
        ),
        "the attached transformer": (attached, {**called, "return_dict": False}),
        "plan.Forecast": (Forecast, {"terms": ("y1",), "coefficients": ((1.0,),)}),
        "plan.Increment": (Increment, {"ranks": {"a": 1}, "saved": 1}),
        "plan.canonical": (canonical, {"sites": plan.sites, "row": plan.rows[1]}),
        "plan.containers": (containers, {"sites": plan.sites, "row": plan.rows[1]}),
        "plan.first_live": (first_live, {"sites": plan.sites, "row": plan.rows[1]}),
        "plan.joint_calls": (joint_calls, {"sites": plan.sites}),
        "fingerprint.has_data": (fingerprint.has_data, {"tensor": x}),
        "fingerprint.config_of": (fingerprint.config_of, {"owner": model}),
        "fingerprint.hash_config": (fingerprint.hash_config, {"config": {"a": 1}}),
        "fingerprint.tensor_digest": (fingerprint.tensor_digest, {"tensor": x}),
        "fingerprint.fingerprint": (fingerprint.fingerprint, {"model": model}),
        "fingerprint.structure_hash": (fingerprint.structure_hash, {"model": model}),
        "fingerprint.adapters_hash": (fingerprint.adapters_hash, {"model": model}),
        "fingerprint.contents_hash": (fingerprint.contents_hash, {"model": model}),
        "fingerprint.named_tensors": (fingerprint.named_tensors, {"model": model}),
        "fingerprint.dtype_name": (fingerprint.dtype_name, {"dtype": torch.float32}),
        "fingerprint.model_dtype": (fingerprint.model_dtype, {"model": model}),
        "ops.rows": (ops.rows, {"modulation": modulation, "x": x}),
        "ops.lowrank_input": (ops.lowrank_input, {"x": x, "b": b}),
        "ops.lowrank_delta": (
            ops.lowrank_delta,
            {"x": x, "y": [y], "p": torch.randn(2, 4, 3), "a": [torch.randn(8, 3)], "b": b},
        ),
        "ops.modulated_norm": (ops.modulated_norm, {"x": x, "scale": modulation, "shift": modulation, "eps": 1e-6}),
        "ops.gated_residual": (ops.gated_residual, {"x": x, "gates": [modulation], "values": [y]}),
        "ops.linear_combination": (ops.linear_combination, {"values": [x, y], "coefficients": numbers}),
        "env.get_logger": (sg_logger, {"name": "ops"}),
    }


def policy_arguments(world: World) -> dict[str, dict[str, Any]]:
    """Every policy's own arguments with their defaults, and those that have none."""
    needed = {
        "manual": {"actions": {"attn": "CRCR"}}, "l2c": {"router": world.saved("router.safetensors", world.router)},
        "deepcache": {"last": 2}, "teacache": {"degree": 1}, "whole-step": {"samples": 1},
    }  # fmt: skip
    return {
        name: {a.name: a.default for a in record.arguments if not a.required} | needed.get(name, {})
        for name, record in sg.policies().items()
    }


def sg_logger(name: str) -> Any:
    from stepgraph.env import get_logger

    return get_logger(name)


def _smoothcache(folder: Path) -> Path:
    path = folder / "schedule.json"
    path.write_text('{"attn": [1, 0, 1, 0], "ff": [1, 1, 1, 1]}')
    return path
