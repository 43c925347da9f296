"""Names that libraries keep to themselves: which of them `ldm_lab` uses, and whether they still mean the same."""

import ast
import contextlib
import inspect
import re
import signal
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted((ROOT / "ldm_lab").rglob("*.py")), ROOT / "train.py", ROOT / "sample.py"]

# Begin with an underscore, but are documented: of named tuples, of `os`, and a key of Hydra's configs.
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit", "_target_"}

# Library -> private name -> why no public name does. Tests below hold the meaning of each name.
ALLOWED = {
    "lightning": {
        "_SubprocessScriptLauncher": "the launcher of all strategies that start processes; not exported",
        "_call_children_scripts": "starts the ranks without the observer that kills the launching process",
        "_launcher": "`Strategy.launcher` cannot be set",
        "_set_num_threads_if_needed": "the share of the cores that Lightning's own launcher gives a rank",
        "_signal_connector": "no setting turns off the handler of SIGTERM, which makes ranks wait for each other",
        "_broadcast_sigterm_tensor": "no setting turns off this broadcast in each step",
        "_logger_connector": "no public call logs the metrics of the current step before its checkpoint",
    },
    "torch": {
        "_step_supports_amp_scaling": "no argument lets GradScaler unscale the gradients of a fused optimizer",
        "_foreach_utils": "no public list of devices with fused optimizers",
        "_get_fused_kernels_supported_devices": "as above",
        "_compiled_call_impl": "a hook of nn.Module would be compiled, and freezing holds for the process",
        "_inductor": "config.freezing; `options` of torch.compile do not reach the tracing",
        "_functorch": "config.donated_buffer has no public switch",
        "_orig_mod": "no public way back from torch.compile",
        "_subclasses": "FakeTensorMode is exported nowhere else",
        "_python_dispatch": "TorchDispatchMode is exported nowhere else",
        "_pytree": "torch has no public pytree",
        "_local_scalar_dense": "the name of an operator",
        "_scaled_dot_product_flash_attention_for_cpu": "the name of an operator",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "the name of an operator",
        "_is_avx512_bf16_supported": "torch.cpu.get_capabilities came with 2.11",
        "_is_amx_tile_supported": "torch.cpu.get_capabilities came with 2.11",
    },
    "wandb": {"_log_artifact": "`use_artifact` refuses a run that is offline"},
    "wandb-workspaces": {"_to_model": "publicly a view can only be sent to W&B"},
}


# --- which names are used


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def defined(tree):
    """Names that a file gives to functions, classes, variables and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_itself(node):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "__setattr__":
            yield from (part.value for part in node.args if isinstance(part, ast.Constant))


def on_itself(node):
    owner = node.value.func if isinstance(node.value, ast.Call) else node.value  # `super()` is a call
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls", "super")


def used(tree):
    """(line, name, whether on `self`) of each name that a file imports, or reads or sets on an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr, on_itself(node)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, part, False) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part, False) for part in parts)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr"):
            yield from (
                (node.lineno, str(part.value), False) for part in node.args[1:2] if isinstance(part, ast.Constant)
            )


def of_libraries(tree, everywhere=frozenset()):
    """(line, name) of the private names that are a library's.

    On `self` that is a name which no file of ours defines (`everywhere`), elsewhere one which the same file does not.
    """
    here = DOCUMENTED.union(defined(tree))
    private = [(line, name, itself) for line, name, itself in used(tree) if is_private(name) and name not in here]
    return [(line, name) for line, name, itself in private if not (itself and name in everywhere)]


def test_each_private_name_of_a_library_has_a_reason():
    allowed = {name for names in ALLOWED.values() for name in names}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    ours = {name for tree in trees.values() for name in defined(tree)}
    found = {
        name: f"{path.relative_to(ROOT)}:{line}"
        for path, tree in trees.items() for line, name in of_libraries(tree, ours)
    }  # fmt: skip
    new = {name: place for name, place in found.items() if name not in allowed}
    assert new == {}, "private names of libraries: use public ones, or give reasons in ALLOWED and test their meaning"
    assert allowed - found.keys() == set(), "no longer used: take them out of ALLOWED"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("trainer._checkpoint_connector.restore()", ["_checkpoint_connector"]),
        ("import torch\ntorch._C._cuda_clearCublasWorkspaces()", ["_C", "_cuda_clearCublasWorkspaces"]),
        ("from torch._dynamo import config", ["_dynamo"]),
        ("from hydra._internal.utils import _locate", ["_internal", "_locate"]),
        ("getattr(module, '_forward_hooks')", ["_forward_hooks"]),
        ("class A(Trainer):\n    def run(self):\n        self._run_stage()", ["_run_stage"]),
        ("class A:\n    def _x(self):\n        self._y = other._x", []),
        ("for a in rows:\n    a._asdict(), a.__dict__, os._exit(1)", []),
    ],
)
def test_the_rule_tells_private_names_of_libraries_from_ours(source, names):
    assert sorted(name for _, name in of_libraries(ast.parse(source))) == sorted(names)


# --- whether they still mean the same


@contextlib.contextmanager
def still(library, question):
    """Context of a test that answers a question with yes; a failure names the library, its version and the question."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        pytest.fail(
            f"{library} {version(library)}: a private name has changed; the answer is no: {question}? ({error!r})"
        )


class Rows(DummyLogger):
    """Keeps the rows that Lightning logs."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


class Step(Callback):
    """Keeps the handler of SIGTERM in a step, and the rows that are logged when the step is to be logged early."""

    def on_train_batch_start(self, *_):
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_batch_end(self, trainer, *_):
        before = len(trainer.logger.rows)
        trainer._logger_connector.update_train_step_metrics()
        self.rows = trainer.logger.rows[before:]


class Numbered(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("number", batch_idx)
        return super().training_step(batch, batch_idx)


def boring(step):
    off = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    cpu = {"accelerator": "cpu", "devices": 1}
    return Trainer(max_steps=2, log_every_n_steps=1, limit_val_batches=0, logger=Rows(), callbacks=[step], **cpu, **off)


@pytest.mark.parametrize("without", [True, False])
def test_lightning_sets_no_handlers_when_told_not_to(without):
    with still("lightning", "are all handlers set by trainer._signal_connector.register_signal_handlers"):
        from ldm_lab.training.callbacks.interrupt import without_own_handlers

        before, step = signal.getsignal(signal.SIGTERM), Step()
        trainer = boring(step)
        if without:
            without_own_handlers(trainer)
        trainer.fit(Numbered())
        assert (step.handler is before) == without


def test_lightning_broadcasts_sigterm_in_one_method():
    """One process alone broadcasts nothing, so the code is read."""
    with still("lightning", "is SIGTERM shared in epoch_loop._broadcast_sigterm_tensor() and nowhere else in a step"):
        from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

        assert list(inspect.signature(_TrainingEpochLoop._broadcast_sigterm_tensor).parameters) == ["self"]
        advance = inspect.getsource(_TrainingEpochLoop.advance)
        assert re.findall(r"[\w.]*broadcast\w*\(", advance) == ["self._broadcast_sigterm_tensor("]


def test_lightning_logs_a_step_before_its_own_time():
    with still("lightning", "does trainer._logger_connector.update_train_step_metrics() log the current step"):
        step = Step()
        boring(step).fit(Numbered())
        assert [row["number"] for row in step.rows] == [1]


def test_lightning_starts_the_ranks_for_our_launcher(monkeypatch):
    with still("lightning", "does _SubprocessScriptLauncher._call_children_scripts keep the ranks in `procs`"):
        from lightning.fabric.utilities.distributed import _set_num_threads_if_needed

        from ldm_lab.training.launcher import Launcher

        monkeypatch.setattr(subprocess, "Popen", lambda command, env, cwd: env["LOCAL_RANK"])
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, "0")  # restored after the test
        launcher = Launcher(LightningEnvironment(), 3, 1)
        launcher._call_children_scripts()
        assert launcher.procs == ["1", "2"]
        strategy = SingleDeviceStrategy()
        strategy._launcher = launcher
        assert strategy.launcher is launcher
        _set_num_threads_if_needed(num_processes=3)


def test_fused_optimizers_may_be_unscaled_first():
    with still("torch", "does optimizer._step_supports_amp_scaling decide who unscales (GradScaler, Lightning)"):
        given = []
        for ours in (False, True):
            weight = nn.Parameter(torch.ones(3))
            optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler("cpu")
            optimizer.register_step_pre_hook(lambda optimizer, *_: given.append(hasattr(optimizer, "grad_scale")))
            if ours:
                optimizer._step_supports_amp_scaling = False
            with contextlib.nullcontext() if ours else pytest.raises(RuntimeError):
                MixedPrecision("16-mixed", "cpu", scaler).clip_gradients(optimizer, 1.0)
            scaler.scale(weight.sum()).backward()
            scaler.step(optimizer)
        assert given == [True, False]


def test_a_compiled_call_may_be_wrapped():
    with still("torch", "does nn.Module call `_compiled_call_impl`, and keep a network in `_orig_mod`"):
        network = nn.Linear(2, 2)
        network.compile()
        assert callable(network._compiled_call_impl)
        network._compiled_call_impl = lambda x: "ours"
        assert network(torch.ones(2)) == "ours"
        assert torch.compile(network)._orig_mod is network


def test_the_compiler_has_these_settings():
    with still("torch", "are these settings of torch's compiler, with these defaults"):
        from torch._functorch import config as functorch
        from torch._inductor import config as inductor

        assert isinstance(functorch.donated_buffer, bool)
        assert inductor.freezing is False
        with inductor.patch(freezing=True):
            assert inductor.freezing is True


def test_devices_of_fused_optimizers():
    with still("torch", "does _get_fused_kernels_supported_devices() give types of devices"):
        from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

        assert {"cpu", "cuda", "mps"} <= set(_get_fused_kernels_supported_devices()) - {"meta"}


def test_operators_have_these_names():
    with still("torch", "are these the names of operators that a TorchDispatchMode sees"):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.add(func)
                return func(*args, **(kwargs or {}))

        seen, attention = set(), "_scaled_dot_product_flash_attention_for_cpu"
        with Operators():
            q = torch.ones(1, 1, 4, 8, requires_grad=True)
            F.scaled_dot_product_attention(q, q, q).sum().backward()
            torch.ones(1).item()
        for name in ("_local_scalar_dense", attention, f"{attention}_backward"):
            assert getattr(torch.ops.aten, name).default in seen


def test_fake_tensors_have_a_size_and_one_storage():
    with still("torch", "has a fake tensor a size, and one storage object while it lives"):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            tensor = torch.empty(1 << 50)
            storage = tensor.untyped_storage()
            assert storage.nbytes() == 4 << 50
            assert tensor.view(2, -1).untyped_storage() is storage


def test_pytrees():
    with still("torch", "does torch.utils._pytree walk nested containers"):
        from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map_only

        nested = {"a": [1, (2.0, "x")]}
        assert tree_leaves(nested) == [1, 2.0, "x"]
        assert tree_map_only(int, lambda one: one + 1, nested) == {"a": [2, (2.0, "x")]}
        wanted = {"cls", "flatten_fn", "unflatten_fn", "serialized_type_name"}
        assert wanted <= inspect.signature(register_pytree_node).parameters.keys()


def test_instructions_of_the_cpu():
    with still("torch", "does torch.cpu._is_..._supported() say what torch.cpu.get_capabilities() says"):
        found = [torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()]
        assert all(isinstance(one, bool) for one in found)
        if hasattr(torch.cpu, "get_capabilities"):
            assert found == [torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_tile")]


def test_an_artifact_may_be_logged_as_used():
    """The record that comes of it is read in test_wandb.py."""
    with still("wandb", "does Run._log_artifact(is_user_created=, use_after_commit=) do what use_artifact does online"):
        from wandb.sdk.wandb_run import Run

        wanted = {"is_user_created", "use_after_commit"}
        assert wanted <= inspect.signature(Run._log_artifact).parameters.keys()
        call = re.search(r"self\._log_artifact\((.*?)\)\n", inspect.getsource(Run.use_artifact), re.S)
        assert {f"{name}=True" for name in wanted} <= set(re.findall(r"\w+=\w+", call[1]))


def test_the_service_of_wandb_logs_a_failed_write():
    with still("wandb", "does its service log `failed to save record` in Settings.log_internal (tracking.finish)"):
        import wandb

        service = next((Path(wandb.__file__).parent / "bin").glob("wandb-core*"))
        assert b"failed to save record" in service.read_bytes()
        assert isinstance(wandb.Settings.log_internal, property)


def test_views_give_their_specification():
    ws = pytest.importorskip("wandb_workspaces.workspaces")
    wr = pytest.importorskip("wandb_workspaces.reports.v2")
    with still("wandb-workspaces", "does view._to_model() give a pydantic model with the specification"):
        us = {"entity": "us", "project": "it"}
        for view in (ws.Workspace(name="all", **us), wr.Report(title="all", **us)):
            assert "spec" in view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
