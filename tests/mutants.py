"""The known ways to break the code, and the program behind `make mutants`.

    python tests/mutants.py [--only TEXT] [--jobs N] [--timeout SECONDS]

Ends with 0 if every mutant is killed, 1 if one survives or cannot be judged, 2 if the table does not fit the
code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mutation import Mutant, TableError, run, table

ROOT = Path(__file__).resolve().parent.parent

MOMENTS = "src/batchnorm/moments.py"
EAGER = "src/batchnorm/kernels/eager.py"
CONTRACT = "src/batchnorm/kernels/contract.py"
PLAIN = "src/batchnorm/kernels/plain.py"
COMPOSITE = "src/batchnorm/kernels/composite.py"
LAYOUT = "src/batchnorm/kernels/layout.py"
CHECKS = "src/batchnorm/checks.py"
ACTIVATIONS = "src/batchnorm/kernels/activations.py"
AUTOGRAD = "src/batchnorm/autograd/function.py"
FUNCTIONAL = "src/batchnorm/functional.py"
LAYER = "src/batchnorm/nn/batchnorm.py"
RUNNING = "src/batchnorm/nn/running.py"
LINEAR = "src/batchnorm/nn/linear.py"
RECALIBRATE = "src/batchnorm/lifecycle/recalibrate.py"
AFFINE = "src/batchnorm/lifecycle/folding/affine.py"
FLOW = "src/batchnorm/lifecycle/folding/flow.py"
PLAN = "src/batchnorm/lifecycle/folding/plan.py"
COLLECT = "src/batchnorm/lifecycle/recalibration/collect.py"
OBSERVE = "src/batchnorm/lifecycle/recalibration/observe.py"
DEPENDENCE = "src/batchnorm/lifecycle/recalibration/dependence.py"
PASSES = "src/batchnorm/lifecycle/recalibration/passes.py"
GAP = "src/batchnorm/lifecycle/recalibration/gap.py"
PAGES = "src/batchnorm/kernels/cpu/pages.py"
GPU = "src/batchnorm/kernels/gpu/programs.py"

# Quick, and without compiling: what is broken above the kernels shows with the eager one as well.
ON_EAGER = "--backend=eager"
OF_MOMENTS = ("tests/test_moments.py",)
OF_EAGER = ("tests/test_conformance.py", "-k", "public_function and eager")
OF_GRADIENTS = (ON_EAGER, "tests/test_gradients.py", "-k", "not create_graph")
OF_FUNCTIONAL = (ON_EAGER, "tests/test_functional.py")
OF_LAYERS = (ON_EAGER, "tests/nn/test_drop_in.py")
OF_REFUSALS = (ON_EAGER, "tests/nn/test_refusals.py")
OF_LINEAR = (ON_EAGER, "tests/nn/test_linear.py")
OF_PAGES = ("tests/kernels/test_cpu_pages.py",)
OF_GPU = ("tests/kernels/test_gpu_interpreted.py", "-k", "kernels_in_the_interpreter")
OF_RECALIBRATION = (ON_EAGER, "tests/lifecycle/test_recalibrate.py")
OF_FOLDING = ("tests/lifecycle/test_fold.py", "-k", "convolution or flatten or row")
OF_FLOW = ("tests/lifecycle/test_fold_flow.py",)
OF_SEQUENTIAL = (ON_EAGER, "tests/lifecycle/recalibration/test_sequential.py")
OF_DEPENDENCE = (ON_EAGER, "tests/lifecycle/recalibration/test_dependence.py")
OF_OBSERVE = (ON_EAGER, "tests/lifecycle/recalibration/test_observe.py")
OF_INTERRUPTS = (ON_EAGER, "tests/lifecycle/recalibration/test_interrupts.py", "-k", "few or every_batch")
OF_GAP = (ON_EAGER, "tests/lifecycle/recalibration/test_gap.py")

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "merge: without the cross term",
        MOMENTS,
        "m2 = m2.sum(0) + (count * (mean - whole).square()).sum(0)",
        "m2 = m2.sum(0)",
        OF_MOMENTS,
    ),
    Mutant(
        "merge: parts count alike, whatever their size",
        MOMENTS,
        "(count * (mean - origin)).sum(0) / safe",
        "(mean - origin).mean(0)",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: the unbiased variance divides by n",
        MOMENTS,
        "self.m2 / (self.count if biased else self.count - 1)",
        "self.m2 / self.count",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: weights count where the mask says absent",
        MOMENTS,
        "return torch.where(mask, sample_weight, torch.zeros_like(sample_weight))",
        "return sample_weight",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: no shift, E[x²] − E[x]²",
        MOMENTS,
        "shift = (total / count).to(torch.float32)",
        "shift = torch.zeros_like(total).to(torch.float32)",
        OF_MOMENTS,
    ),
    Mutant(
        "eager: momentum is the weight of the old value",
        CONTRACT,
        "r.to(value.dtype) * (1 - factor) + value * factor",
        "r.to(value.dtype) * factor + value * (1 - factor)",
        OF_EAGER,
    ),
    Mutant(
        "eager: running_var takes the biased variance",
        CONTRACT,
        "(self.var, batch.variance(biased=False))",
        "(self.var, batch.variance())",
        OF_EAGER,
    ),
    Mutant(
        "eager: normalizes with the unbiased variance",
        EAGER,
        "stats = torch.stack((found.mean, found.variance()))",
        "stats = torch.stack((found.mean, found.variance(biased=False)))",
        OF_EAGER,
    ),
    Mutant(
        "eager: eps outside the root",
        EAGER,
        "        a = torch.rsqrt(var.to(wide) + eps)",
        "        a = 1 / (torch.sqrt(var.to(wide)) + eps)",
        OF_EAGER,
    ),
    Mutant(
        "eager: the low part of the mean is dropped",
        EAGER,
        "shift = -torch.where(torch.isfinite(lo), lo * a, torch.zeros_like(lo))",
        "shift = torch.zeros_like(lo)",
        OF_EAGER,
    ),
    Mutant(
        "eager: dx without the path through the variance",
        EAGER,
        "centred.mul_(slope[part.groups]).add_(constant[part.groups])",
        "centred.mul_(0.0).add_(constant[part.groups])",
        OF_EAGER,
    ),
    Mutant(
        "eager: dx without the path through the mean",
        EAGER,
        "(sums[0] / count - sweep.affine.lo * per_unit)",
        "(-sweep.affine.lo * per_unit)",
        OF_EAGER,
    ),
    Mutant(
        "eager: the mask is ignored in dx",
        EAGER,
        "through_statistics.masked_fill_(~part.of(sweep.present), 0)",
        "pass",
        OF_EAGER,
    ),
    Mutant(
        "eager: the sample weight is ignored in dx",
        EAGER,
        "through_statistics.mul_(part.of(weights))",
        "pass",
        OF_EAGER,
    ),
    Mutant(
        "eager: what is absent is not set to 0",
        EAGER,
        "z = z.masked_fill_(~part.of(present), 0)",
        "pass",
        OF_EAGER,
    ),
    Mutant(
        "eager: dweight by x − mean, not by x̂",
        EAGER,
        "return sum_dz, sum_dz_centred * torch.rsqrt(var.to(wide) + eps)",
        "return sum_dz, sum_dz_centred",
        OF_EAGER,
    ),
    Mutant(
        "activation: the fused ReLU's sign",
        ACTIVATIONS,
        "torch.where(z <= 0, torch.zeros_like(dy), dy)",
        "torch.where(z > 0, torch.zeros_like(dy), dy)",
        OF_EAGER,
    ),
    Mutant(
        "autograd: batch statistics are constants to backward",
        AUTOGRAD,
        "dy, x, stats, call.eps, weight, bias, training=call.population is None,",
        "dy, x, stats, call.eps, weight, bias, training=False,",
        OF_EAGER,
    ),
    Mutant(
        "autograd: batch statistics are constants to the second derivative",
        AUTOGRAD,
        "population = None if call.population is None else (stats[0], stats[1])",
        "population = (stats[0], stats[1])",
        OF_GRADIENTS,
    ),
    Mutant(
        "autograd: x is kept where nothing asks for it",
        AUTOGRAD,
        "ctx.save_for_backward(x if keep_x else None, weight,",
        "ctx.save_for_backward(x, weight,",
        OF_GRADIENTS,
    ),
    Mutant(
        "functional: momentum of the old value",
        FUNCTIONAL,
        "Batch(Running(running_mean, running_var, momentum))",
        "Batch(Running(running_mean, running_var, 1 - momentum))",
        OF_FUNCTIONAL,
    ),
    Mutant(
        "functional: too little weight passes",
        CHECKS,
        "if found <= 1:",
        "if found <= 0:",
        OF_FUNCTIONAL,
    ),
    Mutant(
        "functional: out= may overwrite the residual before it is read",
        FUNCTIONAL,
        "residual = residual.clone()",
        "pass",
        OF_FUNCTIONAL,
    ),
    Mutant(
        "layer: the counter is raised by a forward that fails",
        LAYER,
        "        name = type(self).__name__\n        careful =",
        "        batches = None if batches is None else batches.add_(1)\n"
        "        name = type(self).__name__\n        careful =",
        OF_REFUSALS,
    ),
    Mutant(
        "layer: a skipped batch reaches the statistics",
        RUNNING,
        "where=finite_channels(found, self.running).all()",
        "where=torch.tensor(True)",
        OF_REFUSALS,
    ),
    Mutant(
        "layer: too_few is not looked at",
        LAYER,
        "if careful and has_too_few(",
        "if False and has_too_few(",
        OF_REFUSALS,
    ),
    Mutant(
        "running: the cumulative factor is off by one",
        RUNNING,
        "return Running(mean, var, 1.0 / (int(batches) + 1), batches)",
        "return Running(mean, var, 1.0 / (int(batches) + 2), batches)",
        OF_LAYERS,
    ),
    Mutant(
        "running: a cast to half precision rounds the statistics",
        RUNNING,
        "return before.to(device=buffer.device, dtype=torch.float32)",
        "return buffer.to(torch.float32)",
        OF_LAYERS,
    ),
    Mutant(
        "linear: momentum of the old value",
        LINEAR,
        "momentum: float | None = 0.05",
        "momentum: float | None = 0.95",
        OF_LINEAR,
    ),
    Mutant(
        "linear: fold adds the mean instead of taking it off",
        LINEAR,
        "shift - norm.running_mean.double() * a",
        "shift + norm.running_mean.double() * a",
        OF_LINEAR,
    ),
    Mutant(
        "recalibrate: modes are not restored",
        OBSERVE,
        "            module.training = mode\n",
        "            pass\n",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: layers keep the forward they had meanwhile",
        OBSERVE,
        'layer.__dict__.pop("forward", None)',
        "pass",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: layers keep the buffers they had meanwhile",
        OBSERVE,
        "            layer._buffers.update({b: t for b, t in originals.items() if b in layer._buffers})\n",
        "",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: an interrupted write is not undone",
        RECALIBRATE,
        "t.copy_(kept)",
        "pass",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: an interrupted end is not made up for",
        RECALIBRATE,
        "        observation.end()\n        for each in written:\n",
        "        for each in written:\n",
        OF_INTERRUPTS,
    ),
    Mutant(
        "recalibrate: the paper's estimator with the biased variance",
        COLLECT,
        "torch.stack([f.variance(biased=False) for f in found])",
        "torch.stack([f.variance() for f in found])",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: takes a batch more than max_batches",
        RECALIBRATE,
        "stream = iter(itertools.islice(batches, max_batches))",
        "stream = (b for i, b in enumerate(batches) if max_batches is None or i < max_batches)",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: dropout stays on",
        OBSERVE,
        "            module.training = False\n",
        "            pass\n",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: a batch of one is normalized by itself",
        PASSES,
        "        if found is not None and _too_few(found):\n",
        "        if False:\n",
        OF_RECALIBRATION,
    ),
    Mutant(
        "sequential: the layers before go on normalizing as they did",
        PASSES,
        "                observation.put(name, population.mean, population.var)\n",
        "                pass\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: a use that depends on what remains is measured",
        PASSES,
        "        if not depends <= self._group[name]:\n",
        "        if False:\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: a forward ends one use early",
        PASSES,
        "return max((i + 1 for i, name",
        "return max((i for i, name",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: forwards end early where Python reads values",
        PASSES,
        "        same = whole and not dependence.values_were_read and self.order in (None, self._uses)\n",
        "        same = whole and self.order in (None, self._uses)\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: mutual dependence is measured by statistics that are not there yet",
        PASSES,
        "        by_batch = bool(self._group[name])\n",
        "        by_batch = False\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "dependence: in-place writes are not followed",
        DEPENDENCE,
        "            if _version(t) != version:\n",
        "            if False:\n",
        OF_DEPENDENCE,
    ),
    Mutant(
        "dependence: what Python reads is forgotten",
        DEPENDENCE,
        "            self._control |= depends\n",
        "            pass\n",
        OF_DEPENDENCE,
    ),
    Mutant(
        "dependence: what nothing observed depends on nothing",
        DEPENDENCE,
        "self._known.get(storage, self._ran)",
        "self._known.get(storage, NONE)",
        OF_DEPENDENCE,
    ),
    Mutant(
        "observe: functional uses are not looked for",
        OBSERVE,
        "            if name is not None and _fits(",
        "            if name is not None and self._open and _fits(",
        OF_OBSERVE,
    ),
    Mutant(
        "observe: a forward that computes by hand is not noticed",
        OBSERVE,
        "        if opened.seen or not _fits(layer, x):\n",
        "        if True:\n",
        OF_OBSERVE,
    ),
    Mutant(
        "observe: compiled graphs run past it",
        OBSERVE,
        'torch.compiler.set_stance("force_eager")',
        'torch.compiler.set_stance("default")',
        OF_OBSERVE,
    ),
    Mutant(
        "gap: relative to eval",
        GAP,
        "size += float(then.square().sum())",
        "size += float(now.square().sum())",
        OF_GAP,
    ),
    Mutant(
        "gap: of a layer without its stretch",
        GAP,
        "(shift.square() + stretch.square()).mean()",
        "shift.square().mean()",
        OF_GAP,
    ),
    Mutant(
        "quick look: at the dtypes of parameters, not at how many there are",
        CHECKS,
        "or (weight.numel() == channels and (dtype",
        "or ((dtype",
        OF_REFUSALS,
    ),
    Mutant(
        "running update: the counter stays behind",
        CONTRACT,
        "self.batches.add_(1 if where",
        "self.batches.add_(0 if where",
        OF_LAYERS,
    ),
    Mutant(
        "plain: a view that negates goes to the kernels",
        PLAIN,
        " or t.is_neg()",
        "",
        ("tests/ways/test_strange_tensors.py", "-k", "neg"),
    ),
    Mutant(
        "plain: tensors with a tangent go to the kernels",
        PLAIN,
        " or forward_ad._current_level >= 0:\n        return False",
        ":\n        return False",
        ("tests/ways/test_forward_mode.py", "-k", "tangent_of_the_input"),
    ),
    Mutant(
        "composite: eps stands outside the root",
        COMPOSITE,
        "torch.rsqrt(var.to(wide) + eps)",
        "(torch.rsqrt(var.to(wide)) + eps)",
        ("tests/ways/test_transforms.py", "-k", "grad"),
    ),
    Mutant(
        "composite: the mask is left out of the statistics",
        COMPOSITE,
        "found = _moments(x, counted(mask, sample_weight), channelwise)",
        "found = _moments(x, sample_weight, channelwise)",
        OF_GRADIENTS,
    ),
    Mutant(
        "layout: a transposed input keeps its strides",
        LAYOUT,
        "if suggested is None or x.is_contiguous():",
        "if suggested is None:\n        return torch.preserve_format\n    if x.is_contiguous():",
        ("tests/ways/test_layouts.py", "-k", "view or seen or transposed"),
    ),
    Mutant(
        "cpu: buffers are written behind autograd's back",
        "src/batchnorm/kernels/cpu/grouped.py",
        "torch._C._increment_version((mean, var))",
        "pass",
        ("tests/nn/test_drop_in.py", "-k", "kept_in_a_graph"),
    ),
    Mutant(
        "pool: a block goes to two tensors",
        PAGES,
        "return self._idle[_pages_for(size)].pop()",
        "return self._idle[_pages_for(size)][-1]",
        OF_PAGES,
    ),
    Mutant(
        "pool: the rest of an output takes a whole large page",
        PAGES,
        "whole = size - size % PAGE",
        "whole = self.pages * PAGE",
        (*OF_PAGES, "-k", "whole_pages"),
    ),
    Mutant(
        "resident: pages that were changed are released",
        "src/batchnorm/kernels/cpu/resident.py",
        "if (present & (pages & _OF_A_FILE == 0)).any() or not present.any():",
        "if not present.any():",
        ("tests/kernels/test_cpu_resident.py", "-k", "changed"),
    ),
    Mutant(
        "fold: the running mean is not scaled",
        AFFINE,
        "shift = -mean * scale",
        "shift = -mean",
        OF_FOLDING,
    ),
    Mutant(
        "fold: a grouped weight as if it had one group",
        AFFINE,
        "rows = values.view(self.groups, second).repeat_interleave(first // self.groups, 0)",
        "rows = values.view(self.groups, second).repeat(first // self.groups, 1)",
        OF_FOLDING,
    ),
    Mutant(
        "fold: norms in a row composed the wrong way round",
        PLAN,
        "affine = self._handed[path].then(affine)",
        "affine = affine.then(self._handed[path])",
        OF_FOLDING,
    ),
    Mutant(
        "fold: a shift goes forward through zero padding",
        PLAN,
        "if affine.shifts and not side.even:",
        "if affine.shifts and not side.even and False:",
        ("tests/lifecycle/test_fold.py", "-k", "zero_padding"),
    ),
    Mutant(
        "fold: what else reads the tensor is not looked at",
        FLOW,
        "if stray is not None:",
        "if stray is not None and stray.writes:",
        OF_FLOW,
    ),
    Mutant(
        "fold: the input of a norm may change before it is used",
        PLAN,
        "            if written:",
        "            if written and False:",
        OF_FLOW,
    ),
    Mutant(
        name="convert: hooks bound to the old layer stay bound to it",
        file="src/batchnorm/lifecycle/conversion/transaction.py",
        old="hooks[key] = _bound_to(new, layer, hook)",
        new="hooks[key] = hook",
        tests=(
            "tests/lifecycle/test_convert.py::test_a_model_that_is_a_layer_comes_back_new_with_the_same_tensors_and_hooks",
        ),
    ),
    Mutant(
        name="convert: a join that computes something else is handed over",
        file="src/batchnorm/lifecycle/conversion/agreement.py",
        old="if not difference <= ROUNDING[dtype]:",
        new="if difference < 0:",
        tests=("tests/lifecycle/test_fuse.py::test_a_join_that_computes_something_else_is_found_and_not_made",),
    ),
    Mutant(
        name="convert: the residual is left away",
        file="src/batchnorm/lifecycle/conversion/rewrite.py",
        old='node.kwargs = {**node.kwargs, "residual": other}',
        new="node.kwargs = {**node.kwargs}",
        tests=("tests/lifecycle/test_fuse.py::test_every_form_of_an_addition_is_taken_over_as_the_residual",),
    ),
    Mutant(
        name="ranks: every rank counts alike",
        file="src/batchnorm/nn/distributed.py",
        old="counts = parts[:, :1].expand(-1, channels)",
        new="counts = parts[:, :1].mean(0, True).expand(len(parts), channels)",
        tests=("tests/nn/test_distributed.py::test_the_ranks_may_have_different_spatial_sizes",),
    ),
    Mutant(
        name="ranks: counts by channel are not exchanged",
        file="src/batchnorm/nn/distributed.py",
        old="per_channel = any(t.dim() == x.dim() and t.shape[1] > 1 for t in weights)",
        new="per_channel = False",
        tests=("tests/nn/test_distributed.py::test_ranks_give_what_one_process_gives_on_the_whole_batch",),
    ),
    Mutant(
        name="ranks: the sums of backward stay local",
        file="src/batchnorm/autograd/phases.py",
        old="total = reducer.sums(torch.stack(local))",
        new="total = torch.stack(local)",
        tests=("tests/nn/test_distributed.py::test_a_batch_cut_in_any_way_gives_the_same",),
    ),
    Mutant(
        name="ranks: the gather's gradient is this rank's alone",
        file="src/batchnorm/nn/distributed.py",
        old="return wire.sum_values(whole)[wire.group.rank()]",
        new="return whole[wire.group.rank()].clone()",
        tests=("tests/nn/test_distributed.py::test_second_derivatives_are_those_of_the_whole_batch",),
    ),
    Mutant(
        name="ranks: an empty batch counts as a step",
        file="src/batchnorm/nn/distributed.py",
        old="elif self._exchange.empty:",
        new="elif False:",
        tests=("tests/nn/test_distributed.py::test_too_few_is_judged_over_all_ranks_and_all_say_so",),
    ),
    Mutant(
        name="recalibrate: each rank keeps to its own batches",
        file="src/batchnorm/lifecycle/recalibration/ranks.py",
        old="every[0][name].merge(*(e[name] for e in every[1:]))",
        new="own[name].merge()",
        tests=("tests/lifecycle/recalibration/test_ranks.py::test_ranks_give_what_one_process_gives_on_all_batches",),
    ),
    Mutant(
        "gpu: tiles are merged without the cross term",
        GPU,
        "m2 = m2 + its_m2 + delta * delta * (n * share)",
        "m2 = m2 + its_m2",
        OF_GPU,
    ),
    Mutant(
        "gpu: the fused ReLU's sign",
        GPU,
        "dz = tl.where(z <= 0, 0.0, dz)",
        "dz = tl.where(z >= 0, 0.0, dz)",
        OF_GPU,
    ),
    Mutant(
        "gpu: dx forgets what float32 leaves of the mean",
        GPU,
        "_across((sum_dz / n - lo * slope).to(tl.float32))",
        "_across((sum_dz / n).to(tl.float32))",
        OF_GPU,
    ),
    Mutant(
        "gpu: every part updates the running statistics",
        GPU,
        "            if tl.program_id(1) == 0:\n                _finish(",
        "            if tl.program_id(1) >= 0:\n                _finish(",
        OF_GPU,
    ),
    # When running statistics move.
    Mutant(
        name="updates: a recomputation counts",
        file=RUNNING,
        old="if not _is_tracing() and _graph_task() != -1:",
        new="if not _is_tracing() and _graph_task() < -1:",
        tests=("tests/nn/test_checkpointing.py::test_a_checkpointed_step_is_the_plain_one_to_the_bit",),
    ),
    Mutant(
        name="updates: a skipped micro-batch is merged",
        file=RUNNING,
        old="(torch.where(where, t, torch.zeros_like(t)) for t in _tensors_of(batch))",
        new="_tensors_of(batch)",
        tests=("tests/lifecycle/test_updates.py::test_a_batch_that_is_skipped_stays_out_of_the_block_too",),
    ),
    Mutant(
        name="updates: a fused optimizer's skipped step counts",
        file="src/batchnorm/lifecycle/updates.py",
        old="None if found is None else found.detach().clone()",
        new="None",
        tests=("tests/lifecycle/test_updates.py::test_a_step_that_the_scaler_skips_leaves_the_statistics",),
    ),
    Mutant(
        name="updates: committed over what has changed",
        file="src/batchnorm/lifecycle/updates.py",
        old="if outdated and bool(",
        new="if False and bool(",
        tests=(
            "tests/lifecycle/test_updates.py::test_updates_are_not_written_over_what_changed_the_statistics_in_the_meantime",
        ),
    ),
    Mutant(
        name="exact accumulation: the sums of the last micro-batch alone",
        file="src/batchnorm/lifecycle/accumulation/block.py",
        old="total = local if total is None else total + local",
        new="total = local",
        tests=("tests/lifecycle/test_exact.py::test_the_gradient_is_that_of_differences",),
    ),
    Mutant(
        name="exact accumulation: the gradient of M2 without the distance of the means",
        file="src/batchnorm/lifecycle/accumulation/block.py",
        old="(dmean / n + 2 * dm2 * distance) * count",
        new="(dmean / n) * count",
        tests=("tests/lifecycle/test_exact.py::test_gradients_and_statistics_are_those_of_the_large_batch",),
    ),
    Mutant(
        name="domains: the first one's statistics stay where they were",
        file="src/batchnorm/nn/domains.py",
        old='suffix = "" if each == name else f"__{name}" if each == first else f"__{each}"',
        new='suffix = "" if each == name else f"__{each}"',
        tests=("tests/lifecycle/test_domains.py::test_each_domain_is_a_model_of_its_own_but_for_weight_and_bias",),
    ),
    Mutant(
        name="freeze: train() thaws",
        file="src/batchnorm/nn/frozen.py",
        old="        layer.training = False\n        self.mode = mode",
        new="        self.mode = mode",
        tests=("tests/lifecycle/test_freeze.py::test_statistics_survive_train",),
    ),
)


def main(arguments: Sequence[str], mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description="Break the code in known ways")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the mutants whose name contains TEXT")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="runs at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each run (default: 300)")
    options = parser.parse_args(arguments)

    chosen = [mutant for mutant in mutants if options.only in mutant.name]
    if not chosen:
        print(f"mutants: expected a mutant with {options.only!r} in its name, got none of {len(mutants)}.")
        return 2
    try:
        outcomes = run(chosen, root, jobs=options.jobs, timeout=options.timeout)
    except TableError as error:
        print(f"mutants: {error}")
        return 2
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in bad:
        if outcome.output:
            print(f"\n{outcome.name}, {outcome.verdict}:\n{outcome.output.strip()}")
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    print(f"\n{killed} of {len(chosen)} mutants killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
