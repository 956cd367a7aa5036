"""The example model, its loaders, and its loops."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import fashion_mnist_mlp
from data.fashion_mnist import load_fashion_mnist, normalised
from fashion_mnist_mlp import (
    Batches,
    FashionMLP,
    evaluate,
    get_data_loaders,
    set_seed,
    train_epoch,
)


class Recorder:
    """A tracker that writes down what is asked of it."""

    def __init__(self):
        self.calls = []

    def start_tracking(self):
        self.calls.append("start")

    def stop_tracking(self):
        self.calls.append("stop")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    nowhere = tmp_path_factory.mktemp("empty")
    return load_fashion_mnist(nowhere, download=False, system_copy=nowhere)


@pytest.fixture
def loaders(data):
    return get_data_loaders(64, train_limit=500, test_limit=200, data=data)


@pytest.fixture
def model():
    set_seed(0)
    return FashionMLP([16, 8])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


class TestModel:
    def test_layer_names_and_widths(self):
        model = FashionMLP(hidden_sizes=[64, 32, 16])
        linear = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if fc(m)}
        assert linear == {"fc1": (784, 64), "fc2": (64, 32), "fc3": (32, 16), "fc_out": (16, 10)}

    def test_default_widths(self):
        model = FashionMLP()
        assert (model.fc1.out_features, model.fc2.out_features) == (128, 64)
        assert model.fc_out.out_features == 10

    def test_other_inputs_and_classes(self):
        model = FashionMLP([4], input_size=12, num_classes=3)
        assert model(torch.zeros(5, 12)).shape == (5, 3)

    @pytest.mark.parametrize("shape", [(7, 1, 28, 28), (7, 28, 28), (7, 784)])
    def test_input_shapes(self, model, shape):
        images = torch.randn(7, 784)
        assert torch.equal(model(images.view(shape)), model(images))
        assert model(images.view(shape)).shape == (7, 10)

    def test_is_linear_relu_linear(self, model):
        images = torch.randn(3, 784)
        hidden = model.fc2(model.fc1(images).relu()).relu()
        assert torch.equal(model(images), model.fc_out(hidden))

    def test_dropout_acts_in_training_only(self):
        model = FashionMLP([64], dropout=0.5)
        images = torch.randn(3, 784)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))

    @pytest.mark.parametrize("sizes", [[], [0], [64, -1], [1.5], [True], ["64"], "64", 64, None])
    def test_bad_hidden_sizes(self, sizes):
        with pytest.raises(ValueError, match="hidden_sizes"):
            FashionMLP(sizes)

    def test_bad_dropout(self):
        with pytest.raises(ValueError, match="dropout"):
            FashionMLP([4], dropout=-0.5)


def fc(module):
    return isinstance(module, nn.Linear)


class TestLoaders:
    def test_one_pass_is_the_whole_set(self, loaders, data):
        train, test = loaders
        assert (train.num_samples, test.num_samples) == (500, 200)
        batches = list(train)
        assert len(batches) == len(train) == 8
        assert [len(labels) for _, labels in batches] == [64] * 7 + [52]
        images = torch.cat([images for images, _ in batches])
        whole = normalised(data.train_images[:500])
        assert images.shape == (500, 1, 28, 28)
        assert torch.equal(images.sum((1, 2, 3)).sort()[0], whole.sum((1, 2, 3)).sort()[0])

    def test_labels_stay_with_their_images(self, loaders, data):
        whole = normalised(data.train_images[:500])
        images, labels = next(iter(loaders[0]))
        for image, label in zip(images, labels, strict=True):
            place = (whole == image).all(-1).all(-1).all(-1).nonzero()
            assert label in data.train_labels[place.flatten()]

    def test_training_set_is_shuffled_each_epoch(self, loaders):
        first, second = (torch.cat([labels for _, labels in loaders[0]]) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(first.bincount(), second.bincount())

    def test_test_set_keeps_its_order(self, loaders, data):
        for _ in range(2):
            labels = torch.cat([labels for _, labels in loaders[1]])
            assert torch.equal(labels, data.test_labels[:200])

    def test_order_comes_from_the_seed_alone(self, data):
        def orders(seed):
            torch.randn(seed + 1)  # the global generator plays no part
            train, _ = get_data_loaders(100, train_limit=300, seed=seed, data=data)
            return torch.stack([torch.cat([labels for _, labels in train]) for _ in range(2)])

        assert torch.equal(orders(1), orders(1))
        assert not torch.equal(orders(1), orders(2))

    def test_source_is_told(self, loaders, data):
        assert loaders[0].source == loaders[1].source == data.source

    def test_limit_beyond_the_set(self, data):
        train, test = get_data_loaders(train_limit=10**9, data=data)
        assert (train.num_samples, test.num_samples) == (5_000, 1_000)

    def test_finds_the_data_itself(self, monkeypatch):
        monkeypatch.setenv("FASHION_MNIST_OFFLINE", "1")
        train, test = get_data_loaders(train_limit=100, test_limit=50)
        assert (train.num_samples, test.num_samples) == (100, 50)

    @pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"train_limit": 0}, {"test_limit": -1}])
    def test_bad_arguments(self, data, wrong):
        with pytest.raises(ValueError, match="at least 1"):
            get_data_loaders(data=data, **wrong)


class TestTrainEpoch:
    def test_numbers_equal_a_recomputation(self, model, data):
        other = copy.deepcopy(model)
        train, _ = get_data_loaders(64, train_limit=500, data=data)
        found = train_epoch(model, train, nn.CrossEntropyLoss(), sgd(model), progress=False)

        train, _ = get_data_loaders(64, train_limit=500, data=data)
        optimizer, losses, hits = sgd(other), [], []
        for images, labels in train:
            logits = other(images)
            each = nn.functional.cross_entropy(logits, labels, reduction="none")
            losses += each.tolist()
            hits += (logits.argmax(1) == labels).tolist()
            optimizer.zero_grad()
            each.mean().backward()
            optimizer.step()

        assert found == pytest.approx((np.mean(losses), np.mean(hits)), rel=1e-6)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name])

    def test_same_seed_same_losses(self, data):
        def losses():
            set_seed(3)
            model = FashionMLP([16], dropout=0.2)
            train, _ = get_data_loaders(train_limit=300, seed=3, data=data)
            criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
            return [train_epoch(model, train, criterion, optimizer) for _ in range(2)]

        assert losses() == losses()

    def test_learns(self, model, loaders):
        criterion, optimizer = nn.CrossEntropyLoss(), sgd(model)
        epochs = [train_epoch(model, loaders[0], criterion, optimizer) for _ in range(5)]
        assert epochs[-1][0] < epochs[0][0]
        assert epochs[-1][1] > 0.5

    def test_opens_and_closes_a_window(self, model, loaders):
        tracker = Recorder()
        train_epoch(model, loaders[0], nn.CrossEntropyLoss(), sgd(model), tracker)
        assert tracker.calls == ["start", "stop"]

    def test_closes_the_window_after_an_error(self, model, loaders):
        def broken(logits, labels):
            raise RuntimeError("broken criterion")

        tracker = Recorder()
        with pytest.raises(RuntimeError, match="broken criterion"):
            train_epoch(model, loaders[0], broken, sgd(model), tracker)
        assert tracker.calls == ["start", "stop"]

    def test_puts_the_model_into_training_mode(self, model, loaders):
        model.eval()
        train_epoch(model, loaders[0], nn.CrossEntropyLoss(), sgd(model))
        assert model.training

    def test_no_batches(self, model):
        with pytest.raises(ValueError, match="no batches"):
            train_epoch(model, [], nn.CrossEntropyLoss(), sgd(model))

    def test_takes_any_iterable_of_batches(self, model, loaders):
        batches = (batch for batch in list(loaders[0]))
        loss, accuracy = train_epoch(model, batches, nn.CrossEntropyLoss(), sgd(model))
        assert loss > 0
        assert 0 <= accuracy <= 1


class TestEvaluate:
    def test_numbers_equal_a_recomputation(self, model, loaders):
        images, labels = loaders[1].images, loaders[1].labels
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        assert evaluate(model, loaders[1]) == pytest.approx((loss, accuracy))

    def test_other_criterion(self, model, loaders):
        criterion = nn.CrossEntropyLoss(label_smoothing=0.3)
        expected = criterion(model(loaders[1].images), loaders[1].labels).item()
        assert evaluate(model, loaders[1], criterion)[0] == pytest.approx(expected)

    @pytest.mark.parametrize("training", [True, False])
    def test_restores_the_mode_of_each_module(self, loaders, training):
        model = FashionMLP([16], dropout=0.5).train(training)
        model.fc1.train(not training)
        before = [module.training for module in model.modules()]
        assert evaluate(model, loaders[1]) == evaluate(model, loaders[1])  # dropout is off
        assert [module.training for module in model.modules()] == before

    def test_restores_the_mode_after_an_error(self, model):
        with pytest.raises(RuntimeError):
            evaluate(model, [(torch.zeros(2, 3), torch.zeros(2))])
        assert model.training

    def test_leaves_no_gradients(self, model, loaders):
        evaluate(model, loaders[1])
        assert all(parameter.grad is None for parameter in model.parameters())


def test_set_seed_covers_all_generators():
    def draws():
        set_seed(5)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draws() == draws()


def test_batches_are_views_where_nothing_is_shuffled():
    images = torch.zeros(10, 1)
    batches = Batches(images, torch.zeros(10), 4, "made up")
    assert next(iter(batches))[0].data_ptr() == images.data_ptr()


def test_main_prints_a_line_per_epoch(monkeypatch, capsys):
    monkeypatch.setenv("FASHION_MNIST_OFFLINE", "1")
    options = {"--epochs": "2", "--hidden-sizes": "16", "--train-limit": "300", "--device": "cpu"}
    fashion_mnist_mlp.main([part for option in options.items() for part in option])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Data: ")
    assert [line.split(":")[0] for line in lines[1:]] == ["Epoch 1", "Epoch 2"]
