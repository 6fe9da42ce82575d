"""Prototype generation: classes, levels, candidates and the generators by name."""

import logging

import pytest
import torch
import torch.nn.functional as F

from globalkd.prototypes import generation as prototype_generation
from globalkd.prototypes.generation import dense_instances, generate_prototypes, rows_by_class
from globalkd.prototypes.generators import (
    PROTOTYPE_GENERATOR_REGISTRY,
    ClassInstances,
    dbscan,
)
from globalkd.prototypes.settings import GenerationSettings
from globalkd.prototypes.sparse_coding import select_atoms
from globalkd.prototypes.structures import PairedFeatures

GENERATORS = ["pursuit", "kmeans", "dbscan", "ambiguous", "random"]
every_generator = pytest.mark.parametrize("generator", GENERATORS)


def paired_features(counts, levels=("p2", "p3"), d_t=8, d_s=5, seed=0):
    """Random instances in mixed order, `counts[k]` of class k."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = len(classes)
    corner = 50 * torch.rand(rows, 2, generator=g)
    return PairedFeatures(
        teacher={n: torch.randn(rows, d_t, generator=g) + 0.5 for n in levels},
        student={n: torch.randn(rows, d_s, generator=g) + 0.5 for n in levels},
        classes=classes[torch.randperm(rows, generator=g)],
        image_ids=torch.arange(rows),
        boxes=torch.cat([corner, corner + 1 + 50 * torch.rand(rows, 2, generator=g)], dim=1),
        annotation_ids=torch.zeros(rows, dtype=torch.int64),
    )


def generate(features, num_classes, *, progress=False, **changes):
    settings = GenerationSettings(**{"num_prototypes": 4, **changes})
    return generate_prototypes(features, settings, num_classes=num_classes, progress=progress)


def clusters(sizes, radius=0.02, seed=0):
    """Instances around orthogonal directions; (features of one class and level, cluster ids)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=g)]
    noise = radius * torch.randn(2, len(labels), 8, generator=g)
    features = paired_features([len(labels)], levels=("p2",), d_t=8, d_s=8)
    features.teacher["p2"] = torch.eye(8)[labels] + noise[0]
    features.student["p2"] = torch.eye(8)[labels] + noise[1]
    return features, labels


@every_generator
class TestEveryGenerator:
    def test_prototypes_are_distinct_instances_of_their_class(self, generator):
        features = paired_features([30, 0, 12])
        result = generate(features, 3, generator=generator)
        assert result.counts.tolist() == [30, 0, 12]
        for level in features.levels:
            assert result.valid[level].tolist() == [[True] * 4, [False] * 4, [True] * 4]
            for k in (0, 2):
                rows = result.rows[level][k]
                assert len(set(rows.tolist())) == 4
                assert (features.classes[rows] == k).all()

    def test_result_holds_the_raw_features_of_the_rows(self, generator):
        features = paired_features([9, 2])
        result = generate(features, 2, generator=generator)
        for level in features.levels:
            valid, rows = result.valid[level], result.rows[level]
            for space in ("teacher", "student"):
                chosen, raw = getattr(result, space)[level], getattr(features, space)[level]
                assert torch.equal(chosen[valid], raw[rows[valid]])
                assert (chosen[~valid] == 0).all()
            assert (rows[~valid] == -1).all()
            assert (result.gain[level][~valid] == 0).all()

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_small_class_gives_all_its_instances_in_the_first_slots(self, generator, count):
        features = paired_features([count, 6])
        result = generate(features, 2, generator=generator)
        for level in features.levels:
            assert result.valid[level][0].tolist() == [i < count for i in range(4)]
            rows = result.rows[level][0, :count]
            assert sorted(rows.tolist()) == (features.classes == 0).nonzero().flatten().tolist()

    def test_no_instance_gives_no_prototype(self, generator):
        result = generate(paired_features([0, 0]), 2, generator=generator)
        for level in ("p2", "p3"):
            assert not result.valid[level].any()
            assert result.teacher[level].shape == (2, 4, 8)
            assert result.student[level].shape == (2, 4, 5)
        assert result.counts.tolist() == [0, 0]

    def test_equal_input_gives_equal_prototypes(self, generator):
        features = paired_features([40])
        first, second = (generate(features, 1, generator=generator) for _ in range(2))
        for level in features.levels:
            assert torch.equal(first.rows[level], second.rows[level])

    def test_zero_vectors_never_become_prototypes(self, generator):
        features = paired_features([6], levels=("p2",))
        features.teacher["p2"][0] = 0
        features.student["p2"][4] = 0
        rows = generate(features, 1, generator=generator).rows["p2"][0]
        assert sorted(rows.tolist()) == [1, 2, 3, 5]

    def test_nothing_but_zero_vectors(self, generator):
        features = paired_features([6], levels=("p2",))
        features.teacher["p2"].zero_()
        result = generate(features, 1, generator=generator, density_percentile=40)
        assert not result.valid["p2"].any()
        assert (result.gain["p2"] == 0).all()

    def test_identical_instances(self, generator):
        features = paired_features([12], levels=("p2",))
        features.teacher["p2"][:] = features.teacher["p2"][0].clone()
        features.student["p2"][:] = features.student["p2"][0].clone()
        result = generate(features, 1, generator=generator)
        assert len(set(result.rows["p2"][0].tolist())) == 4
        assert result.gain["p2"].isfinite().all()

    def test_other_classes_do_not_matter(self, generator):
        features = paired_features([20, 15])
        both = generate(features, 2, generator=generator)
        own = (features.classes == 1).nonzero().flatten()
        alone = generate(features.select(own), 2, generator=generator)
        for level in features.levels:
            assert torch.equal(own[alone.rows[level][1]], both.rows[level][1])

    def test_half_precision_features(self, generator):
        features = paired_features([12], levels=("p2",))
        features.teacher["p2"] = features.teacher["p2"].half()
        features.student["p2"] = features.student["p2"].half()
        result = generate(features, 1, generator=generator)
        assert result.valid["p2"].all()
        assert result.teacher["p2"].dtype == torch.float16


class TestPursuit:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_rows_and_gains_are_those_of_the_pursuit_on_the_class(self, normalize):
        features = paired_features([25, 10])
        result = generate(features, 2, normalize=normalize)
        for level in features.levels:
            for k in range(2):
                rows = (features.classes == k).nonzero().flatten()
                t, s = features.teacher[level][rows], features.student[level][rows]
                if normalize:
                    t, s = F.normalize(t, dim=1), F.normalize(s, dim=1)
                indices, gains = select_atoms(t, s, 4, 10.0)
                assert torch.equal(result.rows[level][k], rows[indices])
                share = gains / (t.double().square().sum() + s.double().square().sum())
                assert torch.allclose(result.gain[level][k], share.float(), rtol=1e-4)

    def test_gains_are_shares_of_the_energy(self):
        features, _ = clusters([10, 10, 10], radius=0.01)
        gain = generate(features, 1).gain["p2"][0]
        assert (gain >= 0).all()
        assert 0.99 < gain.sum() <= 1

    def test_scale_of_the_features_does_not_matter_if_normalised(self):
        features = paired_features([30])
        before = generate(features, 1)
        features.teacher = {n: 100 * x for n, x in features.teacher.items()}
        after = generate(features, 1)
        for level in features.levels:
            assert torch.equal(before.rows[level], after.rows[level])

    def test_permuted_rows_give_the_same_prototypes(self):
        features = paired_features([30, 20])
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
        before, after = generate(features, 2), generate(features.select(order), 2)
        for level in features.levels:
            assert torch.equal(order[after.rows[level]], before.rows[level])

    def test_levels_of_different_width(self):
        features = paired_features([20])
        features.student["p3"] = torch.randn(20, 11)
        result = generate(features, 1)
        assert result.student["p2"].shape == (1, 4, 5)
        assert result.student["p3"].shape == (1, 4, 11)


class TestAlternatives:
    @pytest.mark.parametrize("generator", ["pursuit", "kmeans", "dbscan"])
    def test_one_prototype_of_each_cluster(self, generator):
        features, labels = clusters([12, 9, 7])
        rows = generate(features, 1, generator=generator, num_prototypes=3).rows["p2"][0]
        assert sorted(labels[rows].tolist()) == [0, 1, 2]

    @pytest.mark.parametrize("generator", ["kmeans", "dbscan"])
    def test_clusters_are_sought_in_the_space_named(self, generator):
        """Each space has clusters of its own; one prototype comes from each of those."""
        features, labels = clusters([9, 9, 9])
        other = torch.arange(27) % 3
        noise = 0.02 * torch.randn(27, 8, generator=torch.Generator().manual_seed(5))
        features.student["p2"] = torch.eye(8)[other + 4] + noise
        for space, cluster in (("teacher", labels), ("student", other)):
            result = generate(features, 1, generator=generator, num_prototypes=3, space=space)
            assert sorted(cluster[result.rows["p2"][0]].tolist()) == [0, 1, 2]

    def test_dbscan_takes_the_largest_clusters(self):
        features, labels = clusters([6, 14, 10])
        rows = generate(features, 1, generator="dbscan", num_prototypes=2).rows["p2"][0]
        assert labels[rows].tolist() == [1, 2]

    def test_dbscan_fills_up_with_clustered_instances_before_noise(self):
        features, _ = clusters([20])
        outlier = torch.eye(8)[5]
        features.teacher["p2"][3] = outlier
        result = generate(features, 1, generator="dbscan", num_prototypes=19)
        assert 3 not in result.rows["p2"][0].tolist()

    def test_dbscan_looks_at_a_bounded_number_of_instances(self, monkeypatch):
        monkeypatch.setattr("globalkd.prototypes.generators.DBSCAN_MAX_INSTANCES", 10)
        g = torch.Generator().manual_seed(0)
        teacher, student = torch.randn(2, 30, 4, generator=g)
        instances = ClassInstances(
            teacher, student, torch.zeros(30, 4), torch.ones(30, dtype=torch.bool)
        )
        settings = GenerationSettings("dbscan", num_prototypes=20)
        rows, _ = dbscan(instances, settings)
        assert len(set(rows.tolist())) == len(rows) == 10

    def test_ambiguous_takes_the_smallest_boxes(self):
        features = paired_features([20])
        rows = generate(features, 1, generator="ambiguous").rows["p2"][0]
        sides = features.boxes[:, 2:] - features.boxes[:, :2]
        assert rows.tolist() == sides.prod(dim=1).argsort()[:4].tolist()

    def test_random_follows_the_seed(self):
        features = paired_features([100])
        chosen = [generate(features, 1, generator="random", seed=s).rows for s in (1, 1, 2)]
        assert torch.equal(chosen[0]["p2"], chosen[1]["p2"])
        assert torch.equal(chosen[0]["p2"], chosen[0]["p3"])
        assert not torch.equal(chosen[0]["p2"], chosen[2]["p2"])

    def test_random_leaves_the_global_generator_alone(self):
        state = torch.get_rng_state()
        generate(paired_features([30]), 1, generator="random")
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_registered_generator_is_found_by_name(self):
        def first_rows(instances, settings):
            return torch.arange(settings.num_prototypes), None

        PROTOTYPE_GENERATOR_REGISTRY.register(first_rows)
        try:
            features = paired_features([9])
            result = generate(features, 1, generator="first_rows")
        finally:
            del PROTOTYPE_GENERATOR_REGISTRY._obj_map["first_rows"]
        assert result.rows["p2"][0].tolist() == [0, 1, 2, 3]


class TestDensityFilter:
    def instances(self, teacher, student):
        count = len(teacher)
        return ClassInstances(
            teacher, student, torch.zeros(count, 4), torch.ones(count, dtype=torch.bool)
        )

    def test_outliers_of_either_space_are_no_candidates(self):
        features, _ = clusters([20])
        teacher, student = features.teacher["p2"], features.student["p2"]
        teacher[3], student[7] = torch.eye(8)[5], torch.eye(8)[6]
        dense = dense_instances(self.instances(teacher, student), 20)
        assert not dense[3] and not dense[7]
        assert dense.any()

    @pytest.mark.parametrize("percentile", [10, 40, 77])
    def test_equals_the_definition(self, percentile):
        g = torch.Generator().manual_seed(1)
        spaces = [torch.randn(30, 3, generator=g) + 1 for _ in range(2)]
        expected = torch.ones(30, dtype=torch.bool)
        for x in spaces:
            cosine = F.cosine_similarity(x[:, None], x[None], dim=2)
            density = torch.exp(-(((1 - cosine) / 0.1) ** 2)).sum(dim=1)
            expected &= density > density.sort().values[30 * percentile // 100]
        assert torch.equal(dense_instances(self.instances(*spaces), percentile), expected)

    def test_blocks_do_not_change_it(self, monkeypatch):
        g = torch.Generator().manual_seed(2)
        instances = self.instances(*torch.randn(2, 25, 3, generator=g))
        expected = dense_instances(instances, 40)
        monkeypatch.setattr(prototype_generation, "DENSITY_BLOCK", 60)
        assert torch.equal(dense_instances(instances, 40), expected)

    @every_generator
    def test_generators_choose_among_the_dense(self, generator):
        features = paired_features([40], levels=("p2",))
        instances = self.instances(features.teacher["p2"], features.student["p2"])
        dense = dense_instances(instances, 40)
        rows = generate(features, 1, generator=generator, density_percentile=40).rows["p2"][0]
        assert dense[rows[rows >= 0]].all()
        assert (rows >= 0).any()

    def test_falls_back_to_all_with_a_counted_warning(self, caplog):
        """One instance is never strictly above its own percentile."""
        features = paired_features([1, 30])
        with caplog.at_level(logging.WARNING, logger="globalkd"):
            result = generate(features, 2, density_percentile=40)
        assert result.valid["p2"][0].tolist() == [True, False, False, False]
        assert "DENSITY_PERCENTILE" in caplog.text
        assert "2 of 4 pairs" in caplog.text

    def test_autocast_does_not_change_the_candidates(self):
        """Cosines that differ by less than bfloat16 resolves."""
        features, _ = clusters([60])
        settings = {"generator": "ambiguous", "num_prototypes": 60, "density_percentile": 40}
        expected = generate(features, 1, **settings).rows["p2"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(generate(features, 1, **settings).rows["p2"], expected)

    def test_off_by_zero(self, monkeypatch):
        def never(*_):
            raise AssertionError("the filter ran")

        monkeypatch.setattr(prototype_generation, "dense_instances", never)
        assert generate(paired_features([9]), 1).valid["p2"].all()


def test_rows_by_class_partition_the_rows():
    classes = torch.tensor([2, 0, 2, 2, 0])
    assert [x.tolist() for x in rows_by_class(classes, 4)] == [[1, 4], [], [0, 2, 3], []]


def test_features_are_left_as_they_were():
    features = paired_features([12])
    before = {n: x.clone() for n, x in features.teacher.items()}
    generate(features, 1, density_percentile=40)
    assert all(torch.equal(before[n], features.teacher[n]) for n in before)


def test_progress_is_shown_on_request(capsys):
    generate(paired_features([9]), 1)
    assert capsys.readouterr().err == ""
    generate(paired_features([9]), 1, progress=True)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("NUM is 0", {"num_prototypes": 0}),
        ("LAMBDA is -1", {"lam": -1.0}),
        ("LAMBDA is nan", {"lam": float("nan")}),
        ("LAMBDA is inf", {"lam": float("inf")}),
        ("DENSITY_PERCENTILE is 100", {"density_percentile": 100}),
        ("SPACE is 'both'", {"space": "both"}),
        ("DBSCAN_EPS is 0", {"dbscan_eps": 0}),
        ("SEED is -1", {"seed": -1}),
        ("GENERATOR is 'pgm'; it must be one of .*'pursuit'.*'kmeans'", {"generator": "pgm"}),
    ],
)
def test_a_wrong_setting_is_named_by_its_key(key, changes):
    with pytest.raises(ValueError, match=rf"MODEL\.GLOBALKD\.PROTOTYPES\.{key}"):
        generate(paired_features([9]), 1, **changes)


@pytest.mark.faults
def test_a_class_id_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"Class id 1 .*\[0, 1\).*NUM_CLASSES"):
        generate(paired_features([3, 3]), 1)


@pytest.mark.faults
@every_generator
def test_features_that_are_not_finite_are_named(generator):
    features = paired_features([5, 5])
    row = (features.classes == 1).nonzero()[0]
    features.student["p3"][row, 0] = float("nan")
    with pytest.raises(ValueError, match="student features of class 1 on level p3"):
        generate(features, 2, generator=generator)
