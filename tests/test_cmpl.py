"""The equations of cmpl.py: a value worked by hand, a plain loop from the paper, and where gradients go."""

import math
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch

import cmpl
from common.data import Data, Videos
from common.run import Run

pytestmark = pytest.mark.usefixtures("group")


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def naive_unlabelled(logits_s, logits_w, tau):
    """Eq. 1 (and 4, 5 with the other network's logits_w), read off the paper."""
    total = 0.0
    for strong, weak in zip(logits_s.tolist(), logits_w.tolist(), strict=True):
        p = softmax(weak)
        if max(p) >= tau:
            total += -math.log(softmax(strong)[p.index(max(p))])
    return total / len(logits_s)


def random_logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_eq1_known_value():
    # p of the weak clips: (3/4, 1/4) and (1/2, 1/2); tau 0.7 keeps the first, whose label is class 0.
    weak = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    # On its strong clip class 0 has probability 1/5: loss log 5, over both clips log(5) / 2.
    strong = torch.tensor([[0.0, math.log(4.0)], [9.0, -9.0]])
    y, mask = cmpl.pseudo_label(weak.softmax(1), 0.7)
    assert y.tolist() == [0, 0] and mask.tolist() == [1.0, 0.0]
    assert cmpl.unlabelled_loss(strong, y, mask).item() == pytest.approx(math.log(5) / 2, abs=1e-6)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9])
def test_eq1_matches_naive_loop(tau):
    weak, strong = random_logits(40, 7, seed=1), random_logits(40, 7, seed=2)
    ours = cmpl.unlabelled_loss(strong, *cmpl.pseudo_label(weak.softmax(1), tau))
    assert ours.item() == pytest.approx(naive_unlabelled(strong, weak, tau), rel=1e-5)


def test_eq1_threshold_is_inclusive():
    y, mask = cmpl.pseudo_label(torch.tensor([[0.5, 0.5]]), 0.5)
    assert mask.item() == 1.0


def test_eq1_nothing_confident_gives_zero_loss_and_gradient():
    strong = random_logits(5, 3).requires_grad_()
    loss = cmpl.unlabelled_loss(strong, *cmpl.pseudo_label(torch.full((5, 3), 1 / 3), 0.9))
    loss.backward()
    assert loss.item() == 0.0 and not strong.grad.any()


@pytest.mark.parametrize("joint", [False, True])
def test_weak_side_gives_probabilities_without_gradient(joint):
    net, x = Linear(1), [clips(n, seed).requires_grad_() for n, seed in ((2, 1), (6, 2), (6, 3))]
    logits_l, p_w, logits_s = cmpl.forward(net, dict(zip("lws", x, strict=True)), joint)
    for found, clip in ((logits_l, x[0]), (logits_s, x[2])):
        assert torch.allclose(found, net(clip)) and found.requires_grad
    assert torch.allclose(p_w, net(x[1]).softmax(1)) and not p_w.requires_grad
    cmpl.unlabelled_loss(logits_s, *cmpl.pseudo_label(p_w, 0.0)).backward()
    assert x[1].grad is None or not x[1].grad.any()
    assert x[2].grad.abs().sum() > 0


def test_eq2_known_value_and_naive_loop():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # p = (1/4, 3/4), (1/2, 1/2)
    y = torch.tensor([1, 0])
    by_hand = (math.log(4 / 3) + math.log(2)) / 2
    assert cmpl.supervised_loss(logits, y).item() == pytest.approx(by_hand, abs=1e-6)
    logits, y = random_logits(9, 5), torch.arange(9) % 5
    naive = sum(-math.log(softmax(row)[k]) for row, k in zip(logits.tolist(), y.tolist(), strict=True)) / 9
    assert cmpl.supervised_loss(logits, y).item() == pytest.approx(naive, rel=1e-5)


def test_eq6_known_value():
    assert cmpl.total_loss([1.0, 2.0], [10.0, 20.0], 5.0) == 153.0


class Linear(torch.nn.Linear):
    """A network on (B, C, T, H, W) clips of one pixel, that counts its calls."""

    def __init__(self, seed):
        super().__init__(4, 3)
        with torch.no_grad():
            self.weight.copy_(random_logits(3, 4, seed=seed))

    def forward(self, x):
        return super().forward(x.flatten(1))


def clips(n, seed):
    return random_logits(n, 4, 1, 1, 1, seed=seed, scale=1.0)


def step(pri, aux, **kwargs):
    args = Namespace(**(dict(lam=5.0, tau=0.4, joint=False, aux_losses="both") | kwargs))
    x_pri, x_aux = ([clips(n, s) for n, s in ((2, s0), (6, s0 + 1), (6, s0 + 2))] for s0 in (10, 20))
    y_l, nets = torch.tensor([0, 2]), {"pri": pri} | ({} if aux is None else {"aux": aux})
    x = {net: dict(zip("lws", views, strict=True)) for net, views in (("pri", x_pri), ("aux", x_aux))}
    return x_pri, x_aux, y_l, cmpl.train_step(nets, x, y_l, args)


def test_eq4_eq5_labels_cross_over():
    pri, aux = Linear(1), Linear(2)
    x_pri, x_aux, y_l, (loss, terms, _) = step(pri, aux)
    assert terms["loss_u_pri"].item() == pytest.approx(
        naive_unlabelled(pri(x_pri[2]), aux(x_aux[1]), 0.4), rel=1e-5
    )
    assert terms["loss_u_aux"].item() == pytest.approx(
        naive_unlabelled(aux(x_aux[2]), pri(x_pri[1]), 0.4), rel=1e-5
    )
    by_hand = terms["loss_s_pri"] + terms["loss_s_aux"] + 5.0 * (terms["loss_u_pri"] + terms["loss_u_aux"])
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_eq4_auxiliary_gets_no_gradient_from_it():
    pri, aux = Linear(1), Linear(2)
    _, _, _, (_, terms, _) = step(pri, aux)
    terms["loss_u_pri"].backward()
    assert all(p.grad is None or not p.grad.any() for p in aux.parameters())
    assert pri.weight.grad.abs().sum() > 0


def test_eq5_primary_gets_no_gradient_from_it():
    pri, aux = Linear(1), Linear(2)
    _, _, _, (_, terms, _) = step(pri, aux)
    terms["loss_u_aux"].backward()
    assert all(p.grad is None or not p.grad.any() for p in pri.parameters())
    assert aux.weight.grad.abs().sum() > 0


def test_joint_forward_gives_the_same_loss_without_batch_norm():
    nets = Linear(1), Linear(2)
    (_, _, _, (own, _, _)), (_, _, _, (joint, _, _)) = step(*nets), step(*nets, joint=True)
    assert own.item() == pytest.approx(joint.item(), rel=1e-6)


def test_fixmatch_labels_itself():
    pri = Linear(1)
    x_pri, _, y_l, (loss, terms, _) = step(pri, None)
    naive = naive_unlabelled(pri(x_pri[2]), pri(x_pri[1]), 0.4)
    assert terms["loss_u_pri"].item() == pytest.approx(naive, rel=1e-5)
    assert loss.item() == pytest.approx(terms["loss_s_pri"].item() + 5.0 * naive, rel=1e-5)


def test_supervised_baseline_is_eq2_alone():
    pri = Linear(1)
    args = Namespace(lam=0, tau=0.4, joint=False, aux_losses="both")
    x_l, y_l = clips(2, 1), torch.tensor([0, 2])
    loss, _, labels = cmpl.train_step({"pri": pri}, {"pri": {"l": x_l}}, y_l, args)
    assert loss.item() == cmpl.supervised_loss(pri(x_l), y_l).item() and not labels


@pytest.mark.parametrize("kept, weights", [("both", (1, 1)), ("sup", (1, 0)), ("unsup", (0, 1))])
def test_table6_losses_of_the_auxiliary_network(kept, weights):
    _, _, _, (loss, terms, _) = step(Linear(1), Linear(2), aux_losses=kept)
    expected = terms["loss_s_pri"] + weights[0] * terms["loss_s_aux"]
    expected = expected + 5.0 * (terms["loss_u_pri"] + weights[1] * terms["loss_u_aux"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_report_counts_by_hand():
    y_true = torch.tensor([0, 1, 2, 2])
    pri = torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    aux = torch.tensor([0, 0, 2, 2]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = {k: v.item() for k, v in cmpl.pseudo_label_report({"pri": pri, "aux": aux}, y_true).items()}
    assert found == {
        "kept_pri": 0.75, "right_pri": 0.5, "kept_aux": 0.75, "right_aux": 0.5, "agree": 0.5,
        "aux_kept_pri_right": 0.5,
    }  # fmt: skip
    unknown = cmpl.pseudo_label_report({"pri": pri, "aux": aux}, None)
    assert {k: v.item() for k, v in unknown.items()} == {"kept_pri": 0.75, "kept_aux": 0.75, "agree": 0.5}


# ---- D6: where the windows of F and A lie ----------------------------------------------------------


class Source:
    def __init__(self, times):
        self.times = np.asarray(times)

    def __len__(self):
        return len(self.times)


EVEN = np.arange(300) / 25.0
VARYING = np.concatenate([np.arange(150) / 50, 3 + np.arange(150) / 10])  # 50, then 10 frames a second


def starts_of(times, offset, draws=4000, sample=None):
    """(draws, 2): where the windows of F and of A begin."""
    line = ["--data", "k400", "--ratio", "0.01", "--offset", str(offset)]
    sample = sample or partial(cmpl.windows, args=cmpl.parse_args(line))
    pairs = [sample(Source(times), np.random.default_rng(seed)) for seed in range(draws)]
    return np.array([[pri[0], aux[0]] for pri, aux in pairs])


def test_windows_have_one_length_and_two_rates():
    args = cmpl.parse_args(["--data", "k400", "--ratio", "0.01", "--offset", "0"])
    pri, aux = cmpl.windows(Source(EVEN), np.random.default_rng(0), args)
    assert (np.diff(pri) == 8).all() and (np.diff(aux) == 4).all() and pri[0] == aux[0]
    assert len(pri) == 8 and len(aux) == 16
    assert (np.diff(starts_of(EVEN, 0, 100)) == 0).all()


@pytest.mark.parametrize("times, offset", [(EVEN, 2.01), (EVEN, 30), (VARYING, 1.01), (VARYING, 5.01)])
def test_windows_of_the_auxiliary_network_are_uniform_within_t_s(times, offset):
    """Given where F's begins, every window at most t_s seconds away is as likely."""
    pri, aux = starts_of(times, offset).T
    places = []  # of A's window among those that it can be, in [0, 1]
    for a, b in zip(pri, aux, strict=True):
        near = [i for i in range(300 - 64 + 1) if abs(times[i] - times[a]) <= offset]
        assert b in near
        places.append((near.index(b) + 0.5) / len(near))
    counts, _ = np.histogram(places, bins=20, range=(0, 1))
    chi2 = ((counts - 200) ** 2 / 200).sum()  # 19 degrees of freedom; near has 41 windows at least
    assert chi2 < 60


def test_a_video_shorter_than_a_window_has_one_start():
    starts = starts_of(np.arange(50) / 25, 10, 50)
    assert not starts.any()


def test_labelled_and_unlabelled_videos_have_such_windows(tmp_path, monkeypatch):
    labels = np.arange(40) % 2
    train, test = (Videos.make("/", [f"{part}{i}.mp4" for i in range(40)], labels) for part in "ab")
    data = Data("some", 1, ("x", "y"), train, test, False, True, ())

    class Reached(Exception):
        pass

    def reached(sources, *_):
        raise Reached([clips.sample for clips, _ in sources])

    monkeypatch.setattr("cmpl.load_data", lambda *_: data)
    monkeypatch.setattr("cmpl.train_loader", reached)
    line = f"--out {tmp_path}/run --per_class 3 --width 0.0625 --aux_width 0.0625 --stride 8 --offset 10"
    args = cmpl.parse_args(line.split())
    with pytest.raises(Reached) as found, Run("cmpl", args.out, vars(args)) as run:
        cmpl.train(args, run)
    samples = found.value.args[0]
    assert len(samples) == 2
    for sample in samples:
        pri, aux = starts_of(EVEN, 10, 1000, sample).T
        assert len(set(aux)) > 200 and np.isin(aux, (0, 236)).mean() < 0.03 and (pri != aux).mean() > 0.9


def test_fig5_thinned_clips_repeat_the_frames_that_are_kept():
    (clip,) = cmpl.Thinned(8, 8, clips=1, keep_every=4).sample(range(64))
    assert clip.tolist() == [0, 0, 0, 0, 32, 32, 32, 32]
    (clip,) = cmpl.Thinned(8, 8, clips=1).sample(range(64))
    assert clip.tolist() == [0, 8, 16, 24, 32, 40, 48, 56]


def test_weak_views_have_a_short_side_of_their_own():
    """And are the centre, whatever the range of the random crops is."""
    clip = torch.arange(96 * 128).view(1, 1, 96, 128).remainder(251).to(torch.uint8).repeat(2, 3, 1, 1)
    line = "--data k400 --ratio 0.01 --size 48 --weak_side 96 --jitter"
    for jitter in ("50 60", "200 300"):
        view = cmpl.weak(clip, cmpl.parse_args(f"{line} {jitter}".split()))
        assert torch.equal(view, clip[..., 24:72, 40:88])
    args = cmpl.parse_args("--data k400 --ratio 0.01 --size 84".split())  # 8/7 of 84 is all of the 96
    assert torch.equal(cmpl.weak(clip, args), cmpl.augment.resize_crop(clip, 84, 96))


@pytest.mark.parametrize("data, ratio, lam, decay", [
    ("k400", "0.01", 5.0, 1e-4), ("k400", "0.1", 2.0, 1e-4),
    ("ucf101", "0.01", 5.0, 1e-3), ("ucf101", "0.1", 2.0, 1e-3),
])  # fmt: skip
def test_recipes_are_the_papers(data, ratio, lam, decay):
    args = cmpl.parse_args(["--data", data, "--ratio", ratio])
    assert (args.lam, args.weight_decay, args.tau, args.batch, args.mu) == (lam, decay, 0.9, 2, 5)
    assert (args.epochs, args.lr, args.clips, args.crops, args.test_size) == (200, 0.1, 10, 3, 256)
    assert args.lr_batch == 16 * args.batch  # on 16 GPUs
    assert (args.frames, args.stride, args.aux_frames, args.aux_stride) == (8, 8, 16, 4)
