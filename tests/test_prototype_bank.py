"""The prototype bank: projections, reliability, gradients, files, state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from reference_pursuit import sequential_coefficients
from safetensors.torch import load_file, save_file
from torch import nn

from globalkd.prototypes.bank import PROJECTIONS, RELIABILITIES, PrototypeBank
from globalkd.prototypes.projection import Projection, products_by_class, products_by_row
from globalkd.prototypes.structures import PrototypeSet

WIDTHS = {"p2": (7, 5), "p3": (6, 6)}
K, P = 3, 4
#: Class 0 is full, class 1 has two prototypes, class 2 none.
FILLED = [4, 2, 0]
FINGERPRINT = {"teacher": "t.pth", "datasets": ["a", "b"], "lambda": 10.0}
COUNTS = torch.tensor([40, 2, 0])

every_projection = pytest.mark.parametrize("projection", ["cosine", "pursuit"])
every_reliability = pytest.mark.parametrize("kind", ["max_cosine", "coefficients", "none"])


def make_bank(filled=True, **changes):
    settings = {
        "levels": list(WIDTHS),
        "num_classes": K,
        "num_prototypes": P,
        "teacher_channels": {n: w[0] for n, w in WIDTHS.items()},
        "student_channels": {n: w[1] for n, w in WIDTHS.items()},
        "projection": "cosine",
        "projection_lambda": 10.0,
        "reliability": "max_cosine",
        "normalize": True,
    }
    bank = PrototypeBank(**{**settings, **changes})
    if filled:
        bank.update(make_prototypes())
    return bank


def make_prototypes(seed=0, widths=WIDTHS):
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(P) < torch.tensor(FILLED)[:, None]

    def prototypes(side):
        return {
            n: torch.randn(K, P, w[side], generator=g) * valid[..., None] for n, w in widths.items()
        }

    return PrototypeSet(
        teacher=prototypes(0),
        student=prototypes(1),
        valid=dict.fromkeys(widths, valid),
        rows={n: torch.where(valid, 0, -1) for n in widths},
        gain={n: torch.zeros(K, P) for n in widths},
        counts=COUNTS,
    )


def same_space_bank(**changes):
    """Both spaces have equal prototypes, on one level."""
    widths = {"p2": (6, 6)}
    prototypes = make_prototypes(widths=widths)
    prototypes.student = {n: x.clone() for n, x in prototypes.teacher.items()}
    bank = make_bank(
        filled=False,
        levels=["p2"],
        teacher_channels={"p2": 6},
        student_channels={"p2": 6},
        **changes,
    )
    bank.update(prototypes)
    return bank


def instances(rows=9, level="p2", seed=1):
    g = torch.Generator().manual_seed(seed)
    d_t, d_s = WIDTHS[level]
    teacher, student = torch.randn(rows, d_t, generator=g), torch.randn(rows, d_s, generator=g)
    return teacher, student, torch.arange(rows) % K


def project(bank, level, teacher, student, classes=None):
    """Coefficients on one level."""
    return tuple(w[0] for w in bank.project({level: teacher}, {level: student}, classes))


def reliability(bank, level, teacher, student, classes):
    """(R,) omega on one level."""
    return bank.reliability({level: teacher}, {level: student}, classes)[0]


class TestProjection:
    def test_cosine_is_the_cosine_in_each_space(self):
        bank, prototypes = make_bank(), make_prototypes()
        for level in WIDTHS:
            teacher, student, _ = instances(level=level)
            w_t, w_s = project(bank, level, teacher, student)
            for w, x, p in (
                (w_t, teacher, prototypes.teacher[level]),
                (w_s, student, prototypes.student[level]),
            ):
                expected = F.cosine_similarity(x[:, None, None], p[None], dim=-1)
                assert torch.allclose(w, expected, atol=1e-6)

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("lam", [0.0, 10.0])
    def test_pursuit_is_equation_5_on_residuals(self, lam, normalize):
        bank = make_bank(projection="pursuit", projection_lambda=lam, normalize=normalize)
        prototypes = make_prototypes()
        for level in WIDTHS:
            teacher, student, _ = instances(level=level)
            w_t, w_s = project(bank, level, teacher, student)
            for k, count in enumerate(FILLED[:2]):
                vectors = [
                    teacher,
                    student,
                    prototypes.teacher[level][k, :count],
                    prototypes.student[level][k, :count],
                ]
                if normalize:
                    vectors = [F.normalize(x, dim=1) for x in vectors]
                expected = sequential_coefficients(*vectors, lam)
                assert torch.allclose(w_t[:, k, :count].double(), expected[0], atol=1e-5)
                assert torch.allclose(w_s[:, k, :count].double(), expected[1], atol=1e-5)

    @every_projection
    def test_slots_without_a_prototype_give_zero_in_both_spaces(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, _ = instances()
        empty = ~bank.valid("p2")
        assert empty.sum() == K * P - sum(FILLED)
        for w in project(bank, "p2", teacher, student):
            assert w.shape == (9, K, P)
            assert (w[:, empty] == 0).all()
            assert (w[:, ~empty] != 0).all()

    @every_projection
    def test_what_stands_in_a_slot_without_a_prototype_does_not_matter(self, projection):
        prototypes = make_prototypes()
        for space in (prototypes.teacher, prototypes.student):
            for level, x in space.items():
                x[~prototypes.valid[level]] = 7.0
        bank = make_bank(filled=False, projection=projection)
        bank.update(prototypes)
        teacher, student, _ = instances()
        expected = project(make_bank(projection=projection), "p2", teacher, student)
        for a, b in zip(expected, project(bank, "p2", teacher, student)):
            assert torch.equal(a, b)

    @every_projection
    def test_gradient_reaches_the_student_alone(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, _ = instances()
        teacher.requires_grad_()
        student.requires_grad_()
        w_t, w_s = project(bank, "p2", teacher, student)
        assert not w_t.requires_grad
        (w_s - w_t).square().sum().backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0
        assert not list(bank.parameters())

    @every_projection
    def test_equal_features_in_equal_spaces_have_equal_coefficients(self, projection):
        bank = same_space_bank(projection=projection)
        x = torch.randn(8, 6)
        w_t, w_s = project(bank, "p2", x, x)
        assert torch.allclose(w_t, w_s, atol=1e-6)

    @every_projection
    def test_scale_of_a_feature_does_not_matter_if_normalised(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, _ = instances()
        before = project(bank, "p2", teacher, student)
        after = project(bank, "p2", 100 * teacher, 0.01 * student)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after))

    @every_projection
    def test_no_instance(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, classes = instances(rows=0)
        student.requires_grad_()
        w_t, w_s = project(bank, "p2", teacher, student)
        assert w_t.shape == w_s.shape == (0, K, P)
        assert project(bank, "p2", teacher, student, classes)[1].shape == (0, P)
        w_s.sum().backward()
        assert reliability(bank, "p2", teacher, student, classes).shape == (0,)

    @every_projection
    def test_zero_feature_gives_zero_without_nan(self, projection):
        bank = make_bank(projection=projection)
        teacher, student = torch.zeros(2, 7), torch.zeros(2, 5, requires_grad=True)
        w_t, w_s = project(bank, "p2", teacher, student)
        assert (w_t == 0).all() and (w_s == 0).all()
        w_s.sum().backward()
        assert student.grad.isfinite().all()

    @every_projection
    def test_autocast_does_not_change_the_result(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, classes = instances()
        expected = project(bank, "p2", teacher, student)
        weight = reliability(bank, "p2", teacher, student, classes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = project(bank, "p2", teacher, student)
            assert torch.equal(reliability(bank, "p2", teacher, student, classes), weight)
        for a, b in zip(expected, result):
            assert b.dtype == torch.float32
            assert torch.equal(a, b)

    @every_projection
    def test_half_precision_features_give_float32(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, classes = instances()
        teacher, student = teacher.bfloat16(), student.bfloat16()
        w_t, w_s = project(bank, "p2", teacher, student)
        expected = project(bank, "p2", teacher.float(), student.float())
        assert torch.equal(w_t, expected[0]) and torch.equal(w_s, expected[1])
        weight = reliability(bank, "p2", teacher, student, classes)
        assert weight.dtype == torch.float32

    @every_projection
    def test_classes_choose_their_prototypes_and_carry_the_same_gradient(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, classes = instances()
        student.requires_grad_()
        rows = torch.arange(len(classes))
        own = project(bank, "p2", teacher, student, classes)
        expected = [w[rows, classes] for w in project(bank, "p2", teacher, student)]
        for a, b in zip(own, expected):
            assert a.shape == (len(classes), P)
            torch.testing.assert_close(a, b)
        gradients = [torch.autograd.grad(w[1].square().sum(), student)[0] for w in (own, expected)]
        torch.testing.assert_close(*gradients)


class TestReliability:
    @every_projection
    @every_reliability
    def test_lies_in_the_unit_interval_and_is_detached(self, kind, projection):
        bank = make_bank(reliability=kind, projection=projection)
        for seed in range(5):
            teacher, student, classes = instances(rows=60, seed=seed)
            weight = reliability(bank, "p2", 5 * teacher, student.requires_grad_(), classes)
            assert weight.shape == (60,)
            assert not weight.requires_grad
            assert ((weight >= 0) & (weight <= 1)).all()

    @every_reliability
    def test_one_without_prototypes_of_the_class(self, kind):
        bank = make_bank(reliability=kind)
        teacher, student, _ = instances()
        weight = reliability(bank, "p2", teacher, student, torch.full((9,), 2))
        assert (weight == 1).all()

    @every_reliability
    def test_one_with_an_empty_bank(self, kind):
        bank = make_bank(filled=False, reliability=kind)
        assert (reliability(bank, "p2", *instances()) == 1).all()

    @every_projection
    @every_reliability
    def test_one_where_both_spaces_agree(self, kind, projection):
        bank = same_space_bank(reliability=kind, projection=projection)
        x = torch.randn(12, 6)
        weight = reliability(bank, "p2", x, x, torch.arange(12) % K)
        assert torch.allclose(weight, torch.ones(12), atol=1e-5)

    @pytest.mark.parametrize("kind", ["max_cosine", "coefficients"])
    def test_lower_where_the_spaces_disagree(self, kind):
        bank = same_space_bank(reliability=kind)
        prototype = bank.levels["p2"].teacher_prototypes[1, 0]
        apart = -bank.levels["p2"].teacher_prototypes[1, :2].sum(dim=0)
        teacher = torch.stack([prototype, prototype])
        student = torch.stack([prototype, apart])
        near, far = reliability(bank, "p2", teacher, student, torch.tensor([1, 1]))
        assert far < near - 0.2

    def test_max_cosine_is_equation_8(self):
        bank, prototypes = make_bank(), make_prototypes()
        teacher, student, classes = instances()
        weight = reliability(bank, "p2", teacher, student, classes)
        for i, k in enumerate(classes.tolist()):
            if FILLED[k] == 0:
                continue
            own = slice(0, FILLED[k])
            nearest = [
                F.cosine_similarity(x[i], p["p2"][k, own], dim=-1).max()
                for x, p in ((teacher, prototypes.teacher), (student, prototypes.student))
            ]
            expected = (1 - (nearest[0] - nearest[1]).abs()).clamp(0, 1)
            assert torch.allclose(weight[i], expected, atol=1e-6)

    def test_empty_slots_do_not_hide_negative_cosines(self):
        """With every cosine negative, the zeros of empty slots must not be the largest."""
        bank = same_space_bank()
        own = bank.levels["p2"].teacher_prototypes[1, :2]
        x = -own.sum(dim=0, keepdim=True)
        y = own.sum(dim=0, keepdim=True)
        cosines = F.cosine_similarity(x, own, dim=-1)
        assert (cosines < 0).all()
        weight = reliability(bank, "p2", x, y, torch.tensor([1]))
        expected = 1 - (F.cosine_similarity(y, own, dim=-1).max() - cosines.max()).abs()
        assert torch.allclose(weight, expected.clamp(0, 1), atol=1e-6)

    @every_projection
    @pytest.mark.parametrize("lam", [0.0, 10.0])
    def test_coefficients_is_the_distance_of_the_pursuits_coefficients(self, projection, lam):
        settings = {"reliability": "coefficients", "projection_lambda": lam}
        bank = make_bank(projection=projection, **settings)
        pursuit = make_bank(projection="pursuit", **settings)
        teacher, student, classes = instances()
        w_t, w_s = project(pursuit, "p2", teacher, student, classes)
        expected = torch.exp(-(1 + 2 * lam) * (w_t - w_s).norm(dim=1))
        assert torch.allclose(reliability(bank, "p2", teacher, student, classes), expected)

    @pytest.mark.parametrize("kind", ["max_cosine", "coefficients"])
    def test_is_of_directions_whatever_the_pursuit_works_on(self, kind):
        teacher, student, classes = instances()
        expected = reliability(make_bank(reliability=kind), "p2", teacher, student, classes)
        raw = make_bank(reliability=kind, normalize=False)
        for scale in (1.0, 100.0):
            weight = reliability(raw, "p2", scale * teacher, student / scale, classes)
            assert torch.allclose(weight, expected, atol=1e-5)

    @pytest.mark.parametrize("lam", [1e3, 1e6])
    def test_coefficients_keep_their_digits_for_a_large_lambda(self, lam):
        bank = make_bank(reliability="coefficients", projection_lambda=lam)
        teacher, student, classes = instances()
        weight = reliability(bank, "p2", teacher, student, classes)
        level = bank.levels["p2"]
        for i, k in enumerate(classes.tolist()):
            if not FILLED[k]:
                continue
            atoms = (level.teacher_prototypes, level.student_prototypes)
            vectors = (teacher[i : i + 1], student[i : i + 1], *(x[k, : FILLED[k]] for x in atoms))
            w_t, w_s = sequential_coefficients(*(F.normalize(x.double()) for x in vectors), lam)
            expected = torch.exp(-(1 + 2 * lam) * (w_t - w_s).norm())
            assert weight[i].item() == pytest.approx(expected.item(), abs=1e-5)

    def test_coefficients_hardly_depend_on_lambda_for_one_unit_prototype(self):
        """Eq. (5) shrinks the difference by 1 + 2 lambda; the weight undoes it."""
        teacher, student, classes = instances()
        weights = []
        for lam in (0.0, 1.0, 10.0):
            bank = make_bank(reliability="coefficients", projection_lambda=lam)
            level = bank.levels["p2"]
            level.valid[:, 1:] = False
            level.prepare()
            weights.append(reliability(bank, "p2", teacher, student, classes))
        assert torch.allclose(weights[0], weights[1], atol=1e-5)
        assert torch.allclose(weights[0], weights[2], atol=1e-5)


@pytest.mark.parametrize("name", [*PROJECTIONS, "coefficients", "max_cosine"])
def test_all_levels_at_once_is_each_level_by_itself(name):
    """What a GPU computes, on a CPU."""
    widths = {"p2": (6, 5), "p3": (6, 5)}
    bank = make_bank(
        filled=False,
        projection="pursuit",
        teacher_channels={n: w[0] for n, w in widths.items()},
        student_channels={n: w[1] for n, w in widths.items()},
    )
    bank.update(make_prototypes(widths=widths))
    g, classes = torch.Generator().manual_seed(1), torch.arange(9) % K
    teacher, student = (torch.randn(2, 9, d, generator=g) for d in (6, 5))
    question = {**PROJECTIONS, **RELIABILITIES}[name]
    levels = [level.projection for level in bank.levels.values()]
    joint = question(Projection.stack(levels), teacher, student, classes)
    alone = [question(x, t, s, classes) for x, t, s in zip(levels, teacher, student)]
    for whole, parts in zip(joint, zip(*alone)):
        torch.testing.assert_close(whole, torch.stack(parts))


class TestState:
    def test_ready_once_there_is_a_prototype(self):
        bank = make_bank(filled=False)
        assert bank.is_ready is False
        bank.update(make_prototypes())
        assert bank.is_ready is True
        empty = make_prototypes()
        empty.valid = {n: torch.zeros(K, P, dtype=torch.bool) for n in WIDTHS}
        bank.update(empty)
        assert bank.is_ready is False

    @every_projection
    def test_state_dict_round_trip_restores_everything(self, projection):
        bank = make_bank(projection=projection)
        other = make_bank(filled=False, projection=projection)
        other.load_state_dict(bank.state_dict())
        assert other.is_ready is True
        for a, b in zip(
            project(bank, "p2", *instances()[:2]), project(other, "p2", *instances()[:2])
        ):
            assert torch.equal(a, b)

    def test_state_dict_round_trip_inside_another_module(self):
        model, other = nn.Module(), nn.Module()
        model.bank, other.bank = make_bank(), make_bank(filled=False)
        other.load_state_dict(model.state_dict())
        assert other.bank.is_ready is True

    def test_state_dict_without_prototypes_makes_it_not_ready(self):
        bank = make_bank()
        bank.load_state_dict(make_bank(filled=False).state_dict())
        assert bank.is_ready is False

    def test_state_dict_holds_the_prototypes_and_nothing_derived(self):
        names = {name.split(".")[-1] for name in make_bank(projection="pursuit").state_dict()}
        assert names == {"teacher_prototypes", "student_prototypes", "valid"}

    def test_update_replaces_what_was_there(self):
        bank = make_bank()
        bank.update(make_prototypes(seed=9))
        fresh = make_bank(filled=False)
        fresh.update(make_prototypes(seed=9))
        for a, b in zip(
            project(bank, "p3", *instances(level="p3")[:2]),
            project(fresh, "p3", *instances(level="p3")[:2]),
        ):
            assert torch.equal(a, b)

    def test_update_does_not_share_memory_with_its_argument(self):
        prototypes = make_prototypes()
        bank = make_bank(filled=False)
        bank.update(prototypes)
        prototypes.teacher["p2"].zero_()
        assert bank.levels["p2"].teacher_prototypes.abs().sum() > 0

    @every_projection
    def test_copy_is_independent(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, _ = instances()
        before = project(bank, "p2", teacher, student)
        copy.deepcopy(bank).update(make_prototypes(seed=9))
        assert all(torch.equal(a, b) for a, b in zip(before, project(bank, "p2", teacher, student)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    @every_projection
    def test_a_converted_model_still_projects_in_float32(self, projection, dtype):
        bank = make_bank(projection=projection).to(dtype)
        teacher, student, classes = instances()
        w_t, w_s = project(bank, "p2", teacher.to(dtype), student.to(dtype))
        assert w_t.dtype == w_s.dtype == torch.float32
        assert reliability(bank, "p2", teacher, student, classes).dtype == torch.float32

    def test_broadcast_in_one_process_changes_nothing(self):
        bank = make_bank()
        before = copy.deepcopy(bank.state_dict())
        bank.broadcast()
        assert all(torch.equal(before[n], x) for n, x in bank.state_dict().items())

    @pytest.mark.slow
    def test_broadcast_gives_every_process_the_prototypes_of_rank_0(self, tmp_path):
        run_in_processes(_check_broadcast, tmp_path)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @every_projection
    def test_on_a_gpu_as_on_the_cpu(self, projection):
        bank = make_bank(projection=projection)
        teacher, student, classes = instances()
        expected = project(bank, "p2", teacher, student)
        moved = make_bank(filled=False, projection=projection).cuda()
        moved.update(make_prototypes())
        on_gpu = teacher.cuda(), student.cuda()
        for a, b in zip(expected, project(moved, "p2", *on_gpu)):
            assert torch.allclose(a, b.cpu(), atol=1e-5)
        weight = reliability(moved, "p2", *on_gpu, classes.cuda())
        assert torch.allclose(weight.cpu(), reliability(bank, "p2", teacher, student, classes))


def _check_broadcast(rank):
    bank = make_bank(filled=rank == 0, projection="pursuit")
    bank.broadcast()
    expected = make_bank(projection="pursuit")
    assert bank.is_ready is True
    assert torch.equal(bank.valid("p3"), expected.valid("p3"))
    teacher, student, _ = instances(level="p3")
    for a, b in zip(
        project(bank, "p3", teacher, student), project(expected, "p3", teacher, student)
    ):
        assert torch.equal(a, b)


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "new folder" / "prototypes.safetensors"
        make_bank().save(str(path), FINGERPRINT, COUNTS)
        return path

    @every_projection
    def test_round_trip(self, path, projection):
        bank = make_bank(filled=False, projection=projection)
        about = bank.load(str(path), expect=FINGERPRINT)
        assert about == {"fingerprint": FINGERPRINT, "counts": COUNTS.tolist()}
        assert bank.is_ready is True
        expected = make_bank(projection=projection)
        for level in WIDTHS:
            teacher, student, _ = instances(level=level)
            for a, b in zip(
                project(expected, level, teacher, student), project(bank, level, teacher, student)
            ):
                assert torch.equal(a, b)

    def test_nothing_but_the_file_is_left(self, path):
        assert list(path.parent.iterdir()) == [path]

    def test_any_fingerprint_will_do_if_none_is_expected(self, path):
        bank = make_bank(filled=False)
        bank.load(str(path))
        assert bank.is_ready

    def test_a_tuple_in_the_fingerprint_equals_a_list(self, path):
        make_bank().load(str(path), expect={**FINGERPRINT, "datasets": ("a", "b")})

    @pytest.mark.faults
    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
            make_bank().load(str(tmp_path / "none.safetensors"))

    @pytest.mark.faults
    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_a_truncated_file_is_refused(self, path, keep):
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(path, "not a complete safetensors file")

    @pytest.mark.faults
    def test_another_kind_of_file_is_refused(self, path):
        torch.save({"model": {}}, path)
        self.refused(path, "not a complete safetensors file")

    @pytest.mark.faults
    def test_a_changed_byte_is_refused(self, path):
        content = bytearray(path.read_bytes())
        content[-40] ^= 0x10
        path.write_bytes(content)
        self.refused(path, "not an intact prototype file: its sha256")

    @pytest.mark.faults
    def test_safetensors_of_something_else_are_refused(self, path):
        save_file({"weight": torch.zeros(3)}, path)
        self.refused(path, "its format is None; it must be 'globalkd-prototypes'")

    @pytest.mark.faults
    def test_another_version_is_refused(self, path):
        metadata = {"format": "globalkd-prototypes", "version": "7"}
        save_file(load_file(path), path, metadata=metadata)
        self.refused(path, "its version is '7'; it must be '1'")

    @pytest.mark.faults
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_prototypes": 5}, r"\(3, 4, 7\) .* in the file, \(3, 5, 7\) .* needed"),
            ({"num_classes": 8}, r"\(3, 4, 7\) .* in the file, \(8, 4, 7\) .* needed"),
            ({"teacher_channels": {"p2": 9, "p3": 6}}, r"\(3, 4, 9\)"),
            ({"levels": ["p2"]}, r"levels\.p3\.\w+: .* in the file, nothing needed"),
        ],
    )
    def test_prototypes_of_another_model_are_refused(self, path, changes, message):
        bank = make_bank(filled=False, **changes)
        with pytest.raises(ValueError, match=message) as error:
            bank.load(str(path))
        assert str(path) in str(error.value)
        assert not bank.is_ready

    @pytest.mark.faults
    @pytest.mark.parametrize(
        ("expect", "message"),
        [
            ({**FINGERPRINT, "lambda": 1.0}, r"lambda: 10\.0 in the file, 1\.0 here"),
            ({**FINGERPRINT, "seed": 1}, r"seed: 'nothing' in the file, 1 here"),
            ({"lambda": 10.0}, r"datasets: \['a', 'b'\] in the file, 'nothing' here"),
        ],
    )
    def test_another_fingerprint_is_refused(self, path, expect, message):
        self.refused(path, message, expect=expect)

    def refused(self, path, message, expect=None):
        """A ValueError that names the file; the bank keeps its prototypes."""
        bank = make_bank()
        bank.update(make_prototypes(seed=5))
        before = copy.deepcopy(bank.state_dict())
        with pytest.raises(ValueError, match=message) as error:
            bank.load(str(path), expect=expect)
        assert str(path) in str(error.value)
        assert all(torch.equal(before[n], x) for n, x in bank.state_dict().items())


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projection": "dot"},
            r"PROJECTION\.TYPE is 'dot'; it must be one of \['pursuit', 'cosine'\]",
        ),
        ({"projection_lambda": -1.0}, r"PROJECTION\.LAMBDA is -1"),
        ({"reliability": "exp"}, r"RELIABILITY\.TYPE is 'exp'.*'max_cosine'"),
        ({"num_prototypes": 0}, r"PROTOTYPES\.NUM is 0; it must be 1 or more"),
    ],
)
def test_a_wrong_setting_is_named_by_its_key(changes, message):
    with pytest.raises(ValueError, match=rf"MODEL\.GLOBALKD\.{message}"):
        make_bank(**changes)


@pytest.mark.parametrize("classes", [[], [3], [0, 4, 0, 2, 2]])
def test_products_by_class_and_by_row_are_the_same(classes):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(5, 3, 4, generator=generator)
    classes = torch.tensor(classes, dtype=torch.long)
    vectors = [torch.randn(len(classes), 4, generator=generator.manual_seed(1)) for _ in range(2)]
    results = []
    for x, products in zip(vectors, (products_by_row, products_by_class)):
        results.append(products(x.requires_grad_(), atoms, classes))
        results[-1].square().sum().backward()
    torch.testing.assert_close(*results)
    torch.testing.assert_close(vectors[0].grad, vectors[1].grad)
