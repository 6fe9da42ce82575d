"""Properties of the coupled pursuit; the direct method is in `reference_pursuit`."""

import pytest
import torch
import torch.nn.functional as F
from reference_pursuit import direct_pursuit, sequential_coefficients

from globalkd.prototypes.sparse_coding import (
    pair_coefficients,
    projection_operator,
    select_atoms,
    unit_rows,
)

LAMBDAS = [0.0, 1.0, 10.0, 100.0]


def paired(rows, d_t=9, d_s=6, seed=0, unit=False):
    """Float64 features with a common structure in both spaces and rows of different lengths."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 4, generator=g, dtype=torch.float64)
    scale = torch.rand(rows, 1, generator=g, dtype=torch.float64) + 0.5

    def view(width):
        mixing = torch.randn(4, width, generator=g, dtype=torch.float64)
        noise = torch.randn(rows, width, generator=g, dtype=torch.float64)
        x = scale * (latent @ mixing + 0.3 * noise)
        return F.normalize(x, dim=1) if unit else x

    return view(d_t), view(d_s)


def squared_norms(x):
    return x.square().sum(dim=-1)


class TestPairCoefficients:
    @pytest.mark.parametrize("lam", LAMBDAS)
    def test_minimise_equation_4(self, lam):
        """No small step in any direction lowers the objective."""
        teacher, student = paired(7)
        p_t, p_s = teacher[0], student[0]

        def value(w_t, w_s):
            error = squared_norms(teacher - w_t[:, None] * p_t)
            error = error + squared_norms(student - w_s[:, None] * p_s)
            return error + lam * (w_t - w_s).square()

        w_t, w_s = pair_coefficients(teacher @ p_t, student @ p_s, p_t @ p_t, p_s @ p_s, lam)
        for d_t, d_s in [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1)]:
            assert (value(w_t + 1e-3 * d_t, w_s + 1e-3 * d_s) > value(w_t, w_s)).all()

    def test_lambda_zero_decouples_the_spaces(self):
        u, v = torch.randn(2, 8, dtype=torch.float64)
        n_t, n_s = torch.tensor([2.0, 3.0], dtype=torch.float64)
        w_t, w_s = pair_coefficients(u, v, n_t, n_s, 0.0)
        assert torch.allclose(w_t, u / 2) and torch.allclose(w_s, v / 3)

    def test_large_lambda_shares_one_coefficient(self):
        u, v = torch.randn(2, 8, dtype=torch.float64)
        n_t, n_s = torch.tensor([2.0, 3.0], dtype=torch.float64)
        w_t, w_s = pair_coefficients(u, v, n_t, n_s, 1e10)
        assert torch.allclose(w_t, w_s, rtol=0, atol=1e-8)
        assert torch.allclose(w_t, (u + v) / 5, atol=1e-8)

    @pytest.mark.parametrize("lam", LAMBDAS)
    def test_discrepancy_on_a_unit_atom(self, lam):
        u, v = torch.randn(2, 8, dtype=torch.float64)
        one = torch.ones((), dtype=torch.float64)
        w_t, w_s = pair_coefficients(u, v, one, one, lam)
        assert torch.allclose(w_t - w_s, (u - v) / (1 + 2 * lam))

    def test_zero_atom_gives_zero(self):
        w_t, w_s = pair_coefficients(torch.zeros(3), torch.zeros(3), *torch.zeros(2, 1), 0.0)
        assert (w_t == 0).all() and (w_s == 0).all()


class TestSelectAtoms:
    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("lam", LAMBDAS)
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_equals_the_direct_method(self, lam, unit, seed):
        teacher, student = paired(40, seed=seed, unit=unit)
        indices, gains = select_atoms(teacher, student, 7, lam)
        direct = direct_pursuit(teacher, student, 7, lam)
        assert indices.tolist() == direct.indices
        assert torch.allclose(gains, direct.gains, rtol=1e-9, atol=1e-11 * direct.errors[0])

    def test_float32_picks_what_the_direct_method_picks_in_float64(self):
        teacher, student = (x.float() for x in paired(60, seed=3))
        indices, gains = select_atoms(teacher, student, 8, 10.0)
        direct = direct_pursuit(teacher, student, 8, 10.0)
        assert indices.tolist() == direct.indices
        assert torch.allclose(gains, direct.gains)

    def test_finds_planted_atoms(self):
        """Instances scattered around a few orthogonal directions: one pick of each."""
        g = torch.Generator().manual_seed(0)
        groups = torch.arange(30) % 3
        noise = 0.05 * torch.randn(2, 30, 8, generator=g)
        teacher = torch.eye(8)[groups] + noise[0]
        student = torch.eye(8)[groups + 4] + noise[1]
        indices, gains = select_atoms(teacher, student, 3, 10.0)
        assert sorted(groups[indices].tolist()) == [0, 1, 2]
        energy = teacher.square().sum() + student.square().sum()
        assert gains.sum() > 0.9 * energy

    def test_one_direction_is_explained_by_one_atom(self):
        """Every atom explains everything, so all gains tie; among ties the first row wins."""
        g = torch.Generator().manual_seed(0)
        scale = torch.rand(30, 1, generator=g, dtype=torch.float64) + 0.5
        teacher = student = scale * torch.randn(1, 5, generator=g, dtype=torch.float64)
        indices, gains = select_atoms(teacher, student, 4, 10.0)
        assert indices.tolist() == [0, 1, 2, 3]
        assert torch.allclose(gains[0], 2 * teacher.square().sum())
        assert gains[1:].abs().max() < 1e-10

    @pytest.mark.parametrize("lam", LAMBDAS)
    def test_more_atoms_never_raise_the_error(self, lam):
        teacher, student = paired(30, seed=5)
        indices, gains = select_atoms(teacher, student, 12, lam)
        assert (gains >= 0).all()
        errors = []
        for count in range(1, 13):
            atoms = teacher[indices[:count]], student[indices[:count]]
            w_t, w_s = sequential_coefficients(teacher, student, *atoms, lam)
            left = squared_norms(teacher - w_t @ atoms[0]) + squared_norms(student - w_s @ atoms[1])
            errors.append(left.sum())
        assert (torch.stack(errors).diff() <= 1e-9).all()

    def test_gains_sum_to_the_decrease_of_equation_2(self):
        teacher, student = paired(30, seed=6)
        indices, gains = select_atoms(teacher, student, 5, 10.0)
        w_t, w_s = sequential_coefficients(
            teacher, student, teacher[indices], student[indices], 10.0
        )
        before = teacher.square().sum() + student.square().sum()
        after = (teacher - w_t @ teacher[indices]).square().sum()
        after = after + (student - w_s @ student[indices]).square().sum()
        after = after + 10.0 * (w_t - w_s).square().sum()
        assert torch.allclose(gains.sum(), before - after)

    @pytest.mark.parametrize("factor", [1e-3, 1e3])
    def test_scale_law(self, factor):
        """Features times c and lambda times c^2: same picks, gains times c^2."""
        teacher, student = paired(40, seed=7)
        indices, gains = select_atoms(teacher, student, 6, 2.0)
        scaled, scaled_gains = select_atoms(factor * teacher, factor * student, 6, 2.0 * factor**2)
        assert scaled.tolist() == indices.tolist()
        assert torch.allclose(scaled_gains, gains * factor**2, rtol=1e-9)

    def test_permuted_rows_give_the_same_set(self):
        teacher, student = paired(50, seed=8)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
        indices, _ = select_atoms(teacher, student, 8, 10.0)
        permuted, _ = select_atoms(teacher[order], student[order], 8, 10.0)
        assert order[permuted].tolist() == indices.tolist()

    def test_exchanged_spaces_give_the_same_picks(self):
        teacher, student = paired(40, seed=9)
        indices, gains = select_atoms(teacher, student, 6, 10.0)
        exchanged, exchanged_gains = select_atoms(student, teacher, 6, 10.0)
        assert exchanged.tolist() == indices.tolist()
        assert torch.allclose(exchanged_gains, gains)

    @pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
    def test_chunk_size_does_not_change_the_picks(self, chunk_size):
        teacher, student = paired(50, seed=10)
        indices, gains = select_atoms(teacher, student, 8, 10.0)
        chunked, chunked_gains = select_atoms(teacher, student, 8, 10.0, chunk_size=chunk_size)
        assert chunked.tolist() == indices.tolist()
        assert torch.allclose(chunked_gains, gains)

    def test_memory_mapped_features_give_the_same_picks(self, tmp_path):
        features = [x.float() for x in paired(50, seed=10)]
        expected, gains = select_atoms(*features, 8, 10.0)
        mapped = []
        for i, x in enumerate(features):
            x.numpy().tofile(tmp_path / str(i))
            mapped.append(torch.from_file(str(tmp_path / str(i)), size=x.numel()).view_as(x))
        indices, mapped_gains = select_atoms(*mapped, 8, 10.0, chunk_size=7)
        assert indices.tolist() == expected.tolist()
        assert torch.allclose(mapped_gains, gains)

    def test_fewer_rows_than_atoms_are_all_taken_once(self):
        teacher, student = paired(4)
        indices, gains = select_atoms(teacher, student, 10, 10.0)
        assert sorted(indices.tolist()) == [0, 1, 2, 3]
        assert len(gains) == 4
        assert indices.tolist() == direct_pursuit(teacher, student, 10, 10.0).indices

    def test_no_rows(self):
        indices, gains = select_atoms(torch.zeros(0, 5), torch.zeros(0, 3), 4, 10.0)
        assert indices.shape == gains.shape == (0,)
        assert indices.dtype == torch.int64

    def test_duplicates_are_distinct_rows_and_the_first_wins(self):
        teacher, student = (x.repeat(3, 1) for x in paired(10, seed=11))
        indices, _ = select_atoms(teacher, student, 12, 10.0)
        assert len(set(indices.tolist())) == 12
        assert indices[0] < 10
        assert indices.tolist() == direct_pursuit(teacher, student, 12, 10.0).indices

    @pytest.mark.parametrize("lam", [0.0, 10.0])
    def test_zero_vectors_are_never_chosen(self, lam):
        teacher, student = paired(6, seed=12)
        teacher[0], student[3] = 0, 0
        teacher[5], student[5] = 0, 0
        indices, gains = select_atoms(teacher, student, 6, lam)
        assert sorted(indices.tolist()) == [1, 2, 4]
        assert indices.tolist() == direct_pursuit(teacher, student, 6, lam).indices
        assert gains.isfinite().all()

    def test_nothing_but_zeros(self):
        indices, gains = select_atoms(torch.zeros(5, 3), torch.zeros(5, 2), 4, 10.0)
        assert len(indices) == len(gains) == 0

    def test_only_candidates_are_chosen_but_all_rows_count(self):
        teacher, student = paired(40, seed=13)
        candidates = torch.arange(40) % 3 == 0
        indices, gains = select_atoms(teacher, student, 5, 10.0, candidates=candidates)
        direct = direct_pursuit(teacher, student, 5, 10.0, candidates)
        assert candidates[indices].all()
        assert indices.tolist() == direct.indices
        assert torch.allclose(gains, direct.gains)

    @pytest.mark.faults
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("space", ["teacher", "student"])
    def test_features_that_are_not_finite_are_refused(self, space, value):
        features = dict(zip(("teacher", "student"), paired(8)))
        features[space][2, 1] = value
        with pytest.raises(ValueError, match=rf"{space} features .* in 1 of 8 rows"):
            select_atoms(features["teacher"], features["student"], 3, 10.0)

    def test_many_rows_need_no_square_matrix(self):
        """50,000 rows: one matrix of rows times rows would take 10 GB in float32."""
        g = torch.Generator().manual_seed(0)
        teacher = torch.randn(50_000, 8, generator=g)
        student = torch.randn(50_000, 6, generator=g)
        indices, gains = select_atoms(teacher, student, 4, 10.0)
        assert len(set(indices.tolist())) == 4
        assert (gains > 0).all()

    def test_input_is_left_as_it_was(self):
        teacher, student = paired(12)
        before = teacher.clone(), student.clone()
        candidates = torch.ones(12, dtype=torch.bool)
        select_atoms(teacher, student, 4, 10.0, candidates=candidates)
        assert torch.equal(teacher, before[0]) and torch.equal(student, before[1])
        assert candidates.all()


class TestProjectionOperator:
    @pytest.mark.parametrize("unit", [False, True])
    @pytest.mark.parametrize("lam", LAMBDAS)
    def test_equals_the_sequential_pursuit(self, lam, unit):
        teacher, student = paired(20, seed=1, unit=unit)
        atoms = teacher[:5], student[:5]
        operator = projection_operator(*atoms, torch.ones(5, dtype=torch.bool), lam)
        both = torch.cat([teacher, student], dim=1)
        w_t, w_s = both @ operator[0].T, both @ operator[1].T
        expected = sequential_coefficients(teacher, student, *atoms, lam)
        assert torch.allclose(w_t, expected[0], atol=1e-12)
        assert torch.allclose(w_s, expected[1], atol=1e-12)

    def test_classes_are_independent(self):
        teacher, student = (x.view(3, 4, -1) for x in paired(12, seed=2))
        valid = torch.ones(3, 4, dtype=torch.bool)
        together = projection_operator(teacher, student, valid, 10.0)
        for k in range(3):
            alone = projection_operator(teacher[k], student[k], valid[k], 10.0)
            assert torch.allclose(together[k], alone)

    def test_atoms_that_are_not_valid_take_no_part(self):
        teacher, student = paired(6, seed=3)
        valid = torch.tensor([True, False, True, True, False, False])
        masked = projection_operator(teacher, student, valid, 10.0)
        kept = projection_operator(teacher[valid], student[valid], valid[valid], 10.0)
        assert (masked[:, ~valid] == 0).all()
        assert torch.allclose(masked[:, valid], kept)

    def test_atom_is_its_own_coefficient(self):
        """The first atom projects to 1 in both spaces, whatever lambda."""
        teacher, student = paired(4, seed=4)
        operator = projection_operator(teacher, student, torch.ones(4, dtype=torch.bool), 10.0)
        own = operator @ torch.cat([teacher[0], student[0]])
        expected = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
        assert torch.allclose(own, expected.expand(2, 4), atol=1e-12)

    def test_no_valid_atom_gives_zero(self):
        teacher, student = paired(3)
        operator = projection_operator(teacher, student, torch.zeros(3, dtype=torch.bool), 0.0)
        assert (operator == 0).all()


class TestUnitRows:
    def test_length_one_and_same_direction(self):
        x, _ = paired(5)
        unit = unit_rows(x)
        assert torch.allclose(squared_norms(unit), torch.ones(5, dtype=torch.float64))
        assert torch.allclose(unit * x.norm(dim=1, keepdim=True), x)

    def test_zero_row_stays_zero_and_sends_no_gradient(self):
        x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
        unit = unit_rows(x)
        unit[:, 0].sum().backward()
        assert (unit[0] == 0).all()
        assert (x.grad[0] == 0).all()
        assert x.grad.isfinite().all()
