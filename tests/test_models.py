"""Student, teacher and attention pool against the published names, counts and reference forms."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models import segmentation

import losses
import student
import teacher as teacher_module
from data import InputError
from losses import Outputs
from student import VARIANTS, Attention, Block, Encoder, Student, StudentWithHeads, count_parameters, load_encoder
from teacher import (TEACHERS, AttentionPool, Kind, PoolFitter, Teacher, average_precision, initialise, load_clip_pool,
                     presence)
from train import parse_options, schedule

BLOCK = ("norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2")
HUGGING_FACE = {"norm1": "layer_norm_1", "attn.q": "attention.self.query", "attn.proj": "attention.output.dense",
                "attn.sr": "attention.self.sr", "attn.norm": "attention.self.layer_norm", "norm2": "layer_norm_2",
                "mlp.fc1": "mlp.dense1", "mlp.dwconv.dwconv": "mlp.dwconv.dwconv", "mlp.fc2": "mlp.dense2"}


def official_names(variant):
    """The tensors of the official PVTv2 and MiT files, without the classifier."""
    _, _, depths, _, reductions, *_ = VARIANTS[variant]
    layers = []
    for i in range(4):
        layers += [f"patch_embed{i + 1}.proj", f"patch_embed{i + 1}.norm", f"norm{i + 1}"]
        parts = BLOCK + (("attn.sr", "attn.norm") if reductions[i] > 1 else ())
        layers += [f"block{i + 1}.{j}.{part}" for j in range(depths[i]) for part in parts]
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def hugging_face_file(encoder):
    """The encoder's tensors as nvidia/mit-b* names them, with a classifier."""
    state = {"classifier.weight": torch.zeros(10, 4), "classifier.bias": torch.zeros(10)}
    for name, value in encoder.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        part, *rest = layer.split(".", 2)
        stage = int(part[-1]) - 1
        if part.startswith("patch_embed"):
            key = f"patch_embeddings.{stage}.{'layer_norm' if rest == ['norm'] else 'proj'}"
        elif part.startswith("norm"):
            key = f"layer_norm.{stage}"
        elif rest[1] == "attn.kv":
            prefix = f"segformer.encoder.block.{stage}.{rest[0]}.attention.self"
            state[f"{prefix}.key.{kind}"], state[f"{prefix}.value.{kind}"] = value.chunk(2)
            continue
        else:
            key = f"block.{stage}.{rest[0]}.{HUGGING_FACE[rest[1]]}"
        state[f"segformer.encoder.{key}.{kind}"] = value
    return state


def random_encoder(variant="mit_nano", seed=0):
    torch.manual_seed(seed)
    return Encoder(variant).eval()


# ---------------------------------------------------------------- student

@pytest.mark.parametrize("variant, count", [("mit_b0", 3_319_392), ("mit_b1", 13_151_424),
                                            ("pvt_v2_b0", 3_409_760), ("pvt_v2_b1", 13_496_000)])
def test_encoders_have_the_published_parameter_counts(variant, count):
    with torch.device("meta"):
        assert count_parameters(Encoder(variant)) == count


def test_segformer_b0_with_150_classes_has_the_published_parameter_count():
    with torch.device("meta"):
        assert count_parameters(Student("mit_b0", 150)) == 3_752_694


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_names_are_those_of_the_official_files(variant):
    with torch.device("meta"):
        assert set(Encoder(variant).state_dict()) == official_names(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_have_strides_4_8_16_32_or_for_small_pictures_2_4_8_8_and_their_channels(variant):
    with torch.device("meta"):
        maps = Encoder(variant)(torch.empty(2, 3, 64, 96))
    strides = (2, 4, 8, 8) if variant == "mit_nano" else (4, 8, 16, 32)
    channels = VARIANTS[variant][1]
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides)]


@pytest.mark.parametrize("h, w", [(32, 32), (33, 65), (97, 50)])
def test_student_takes_any_size_and_rounds_its_maps_up(h, w):
    S = Student("mit_nano", 5).eval()(torch.randn(1, 3, h, w))
    fine, coarse = (math.ceil(h / 2), math.ceil(w / 2)), (math.ceil(h / 8), math.ceil(w / 8))
    assert S.logits.shape == (1, 5, *fine) and S.before_classifier.shape == (1, 128, *fine)
    assert S.feature.shape == (1, 192, *coarse) and S.projected is S.embedding is None
    assert S.logits.isfinite().all()


@pytest.mark.parametrize("sr", [1, 2])
def test_attention_is_softmax_qk_over_root_d_times_v(sr):
    torch.manual_seed(0)
    B, C, heads, h, w = 2, 8, 2, 4, 6
    d = C // heads
    attention, x = Attention(C, heads, sr), torch.randn(B, h * w, C)
    reduced = x
    if sr > 1:
        reduced = attention.norm(attention.sr(x.transpose(1, 2).reshape(B, C, h, w)).flatten(2).transpose(1, 2))
        assert reduced.shape[1] == h * w // sr ** 2
    (W_k, W_v), (b_k, b_v) = attention.kv.weight.chunk(2), attention.kv.bias.chunk(2)
    q, k, v = attention.q(x), reduced @ W_k.T + b_k, reduced @ W_v.T + b_v
    out = [torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(d), 2) @ v[..., s]
           for s in (slice(i * d, (i + 1) * d) for i in range(heads))]
    torch.testing.assert_close(attention(x, h, w), attention.proj(torch.cat(out, 2)))


def test_stochastic_depth_drops_whole_samples_in_training_and_nothing_in_evaluation():
    torch.manual_seed(0)
    block, branch = Block(8, 2, 1, 4, drop=0.5), torch.randn(64, 3, 8)
    assert block.eval().stochastic_depth(branch) is branch
    kept = block.train().stochastic_depth(branch)
    dropped = kept.flatten(1).eq(0).all(1)
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(kept[~dropped], 2 * branch[~dropped])


def test_stochastic_depth_grows_linearly_to_a_tenth():
    with torch.device("meta"):
        encoder = Encoder("mit_b0")
    drops = [block.drop for i in (1, 2, 3, 4) for block in getattr(encoder, f"block{i}")]
    assert drops == pytest.approx([0.1 * i / 7 for i in range(8)])


def test_layer_norms_have_the_official_epsilons():
    with torch.device("meta"):
        norms = {name: m.eps for name, m in Encoder("mit_b0").named_modules() if isinstance(m, nn.LayerNorm)}
    coarse = {name for name in norms if name.startswith("patch_embed") or name.endswith("attn.norm")}
    assert all(eps == (1e-5 if name in coarse else 1e-6) for name, eps in norms.items()) and len(coarse) == 4 + 6


def test_the_heads_do_not_change_the_start_of_the_student():
    def start(c_teacher):
        torch.manual_seed(3)
        return StudentWithHeads(Student("mit_nano", 2), c_teacher, seed=3), torch.rand(4)

    (alone, after_alone), (taught, after_taught) = start(None), start(16)
    assert all(torch.equal(a, b) for a, b in zip(alone.student.parameters(), taught.student.parameters()))
    assert torch.equal(after_alone, after_taught)
    x = torch.randn(2, 3, 64, 32)
    assert alone.eval()(x).projected is alone(x).embedding is None
    assert taught.eval()(x).projected.shape == (2, 16, 8, 4) and taught(x).embedding.shape == (2, 512)
    assert all(torch.equal(a, b) for a, b in zip(alone(x)[:3], taught(x)[:3]))


def test_the_heads_are_a_1x1_convolution_and_the_average_pool_before_another():
    torch.manual_seed(0)
    net, x = StudentWithHeads(Student("mit_nano", 2), 16).eval(), torch.randn(2, 3, 64, 32)
    S, heads = net(x), net.heads
    A_v, A_l = heads.A_v.weight[:, :, 0, 0], heads.A_l.weight[:, :, 0, 0]
    torch.testing.assert_close(S.projected, torch.einsum("tc,bchw->bthw", A_v, S.feature))
    torch.testing.assert_close(S.embedding, S.feature.mean((2, 3)) @ A_l.T)
    assert {n for n, _ in heads.named_parameters()} == {"A_v.weight", "A_l.weight"}  # no biases


def test_the_map_before_the_students_classifier_gives_its_logits():
    net = Student("mit_nano", 3).eval()
    S = net(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(net.decoder.classifier(S.before_classifier), S.logits)


# ---------------------------------------------------------------- the student's weights

def same_function(a, b):
    x = torch.randn(1, 3, 32, 64)
    return all(torch.equal(m, n) for m, n in zip(a.eval()(x), b.eval()(x)))


def test_official_file_loads_strictly_and_names_what_it_leaves_aside(tmp_path):
    source, target = random_encoder(seed=0), random_encoder(seed=1)
    head = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    torch.save(source.state_dict() | head, tmp_path / "w.pth")
    assert not same_function(source, target)
    assert load_encoder(target, "mit_nano", tmp_path / "w.pth") == ["head.bias", "head.weight"]
    assert same_function(source, target)


def test_hugging_face_file_loads_strictly_with_kv_of_key_rows_then_value_rows(tmp_path):
    source, target = random_encoder("mit_b0", seed=0), random_encoder("mit_b0", seed=1)
    state = hugging_face_file(source)
    assert len(state) == 194
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert load_encoder(target, "mit_b0", tmp_path / "pytorch_model.bin") == ["classifier.bias", "classifier.weight"]
    assert same_function(source, target)
    prefix = "segformer.encoder.block.2.1.attention.self"
    rows = torch.cat([state[f"{prefix}.key.weight"], state[f"{prefix}.value.weight"]])
    assert torch.equal(target.block3[1].attn.kv.weight, rows)


def without(state, ending):
    return {k: v for k, v in state.items() if not k.endswith(ending)}


@pytest.mark.parametrize("change, named", [
    (lambda e: without(e.state_dict(), "block2.0.mlp.fc1.bias"), "block2.0.mlp.fc1.bias"),
    (lambda e: without(hugging_face_file(e), "block.2.1.attention.self.value.weight"), "block3.1.attn.kv.weight"),
    (lambda e: e.state_dict() | {"block9.weight": torch.zeros(1)}, "block9.weight"),
    (lambda e: random_encoder("mit_b0").state_dict(), "give --student the network of the file"),
    (lambda e: {"epoch": 3}, "not a plain state dict"),
], ids=["key missing", "value rows missing", "unknown key", "another variant", "no tensors"])
def test_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, change, named):
    encoder = random_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.save(change(encoder), tmp_path / "w.pth")
    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        load_encoder(encoder, "mit_nano", tmp_path / "w.pth")
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_none_keeps_the_random_start():
    encoder = random_encoder(seed=1)
    assert load_encoder(encoder, "mit_nano", "none") == [] and same_function(encoder, random_encoder(seed=1))


def test_variant_without_published_weights_is_refused():
    with pytest.raises(InputError, match="no published ImageNet weights"):
        load_encoder(random_encoder(), "mit_nano", "imagenet")


def test_imagenet_files_that_share_a_name_are_cached_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    sources = {"mit_b0": random_encoder("mit_b0", seed=5), "mit_nano": random_encoder("mit_nano", seed=5)}
    for variant, source in sources.items():
        path = tmp_path / "nvidia" / variant / "resolve" / "main" / "pytorch_model.bin"
        path.parent.mkdir(parents=True)
        torch.save(hugging_face_file(source), path)
        monkeypatch.setitem(student.IMAGENET, variant, path.as_uri())
    for _ in ("downloaded", "from the cache"):
        for variant, source in sources.items():
            target = random_encoder(variant, seed=6)
            load_encoder(target, variant, "imagenet")
            assert same_function(source, target)
        for path in tmp_path.glob("nvidia/**/*.bin"):
            path.unlink()


def test_failed_download_names_the_option_that_avoids_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(student.IMAGENET, "mit_b0", (tmp_path / "absent.pth").as_uri())
    with pytest.raises(InputError, match="save it as .*absent.pth.*--student-weights none"):
        load_encoder(random_encoder("mit_b0"), "mit_b0", "imagenet")


# ---------------------------------------------------------------- teacher

@pytest.mark.parametrize("name, stride", [("deeplabv3_resnet101", 8), ("deeplabv3_resnet50", 8),
                                          ("deeplabv3_mobilenet_v3_large", 16), ("deeplabv3_resnet10", 8)])
def test_teacher_has_its_stride_and_channels(name, stride):
    with torch.device("meta"):
        net = Teacher(name, 7).eval()
        T = net(torch.empty(2, 3, 64, 96))
    h, w = 64 // stride, 96 // stride
    channels = TEACHERS[name].channels
    assert net.channels == channels and T.projected is T.embedding is None
    assert [tuple(t.shape) for t in T[:3]] == [(2, 7, h, w), (2, channels, h, w), (2, 256, h, w)]


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50"])
def test_teacher_logits_are_torchvisions_before_its_upsampling(name):
    torch.manual_seed(0)
    reference = getattr(models.segmentation, name)(weights=None, weights_backbone=None, num_classes=3).eval()
    net = Teacher(name, 3).eval()
    net.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = F.interpolate(net(x).logits, (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, reference(x)["out"])


def test_the_map_before_the_classifier_gives_the_logits():
    net = Teacher("deeplabv3_resnet10", 3).eval()
    T = net(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(net.classifier[-1](T.before_classifier), T.logits)


def test_frozen_teacher_has_no_gradients_and_keeps_its_statistics():
    net = Teacher("deeplabv3_resnet10", 3).freeze()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    out = net(torch.randn(2, 3, 32, 32))
    assert not any(t.requires_grad for t in out if t is not None) and not any(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name, file_of, prefix, aside", [
    ("deeplabv3_mobilenet_v3_large", models.mobilenet_v3_large, "features.", "classifier"),
    ("deeplabv3_resnet50", models.resnet50, "", "fc")])
def test_imagenet_backbone_loads_whole_and_reports_its_classifier(name, file_of, prefix, aside, monkeypatch, capsys):
    torch.manual_seed(0)
    state = file_of(weights=None).state_dict()
    monkeypatch.setattr(teacher_module, "read_weights", lambda url, option: state)
    net = Teacher(name, 2)
    initialise(net, name, "imagenet")
    assert f" tensors {aside}\n" in capsys.readouterr().out
    assert all(torch.equal(v, state[prefix + k]) for k, v in net.backbone.state_dict().items())


def test_voc_model_is_downloaded_whole_without_its_auxiliary_head(tmp_path, monkeypatch, capsys):
    name = "deeplabv3_mobilenet_v3_large"
    torch.manual_seed(0)
    state = Teacher(name, 21).state_dict()
    torch.save(state | {"aux_classifier.0.weight": torch.zeros(1)}, tmp_path / "voc.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "get_model_weights", lambda model: {
        "COCO_WITH_VOC_LABELS_V1": SimpleNamespace(url=(tmp_path / "voc.pth").as_uri())} if model == name else {})
    net = Teacher(name, 21)
    initialise(net, name, "voc")
    assert "not loaded: 1 tensors aux_classifier" in capsys.readouterr().out
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_published_weights_exist_for_every_teacher_that_claims_them():
    for name in (name for name, kind in TEACHERS.items() if kind.imagenet):
        assert models.get_model_weights(name)["COCO_WITH_VOC_LABELS_V1"].url.startswith("https://download.pytorch.org/")
    for source in ("imagenet", "voc"):
        with pytest.raises(InputError, match="no published weights"):
            initialise(None, "deeplabv3_resnet10", source)


PLAIN = "deeplabv3_mobilenet_v3_large"


@pytest.fixture(scope="module")
def torchvision_state():
    """What torch.save(model.state_dict()) keeps of torchvision's own model with an auxiliary head, three classes."""
    torch.manual_seed(0)
    model = segmentation.__dict__[PLAIN](weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    return model.state_dict()


@pytest.mark.parametrize("age", ["new", "without num_batches_tracked"])
def test_plain_torchvision_file_fills_the_teacher_and_says_what_it_left_aside(tmp_path, torchvision_state, age, capsys):
    state = torchvision_state if age == "new" else without(torchvision_state, "num_batches_tracked")
    torch.save(state, tmp_path / "deeplab.pth")
    net, aside = Teacher(PLAIN, 3), sum(k.startswith("aux_classifier.") for k in state)
    initialise(net, PLAIN, tmp_path / "deeplab.pth")
    assert f"deeplab.pth; not loaded: {aside} tensors aux_classifier" in capsys.readouterr().out and aside > 5
    assert all(torch.equal(v, torchvision_state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("change, named", [
    (lambda s: {k: v[:2] if k.startswith("classifier.4.") else v for k, v in s.items()},
     r"2 tensors differ, the first is classifier.4.\w+ \(there \(2,.*\), here \(3,.*\)\); give --teacher"),
    (lambda s: without(s, "backbone.0.0.weight"),
     r"the first is backbone.0.0.weight \(there nothing, here \(16, 3, 3, 3\)\)"),
    (lambda s: s | {"module.epoch": torch.zeros(1)}, r"module.epoch \(there \(1,\), here nothing\)"),
    (lambda s: Teacher("deeplabv3_resnet10", 3).state_dict(), f"not {PLAIN} with the classes of this data set"),
    (lambda s: {"epoch": 3}, "not a plain state dict"),
], ids=["two classes", "key missing", "unknown key", "another network", "no tensors"])
def test_plain_file_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(
        tmp_path, torchvision_state, change, named):
    net = Teacher(PLAIN, 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(change(torchvision_state), tmp_path / "deeplab.pth")
    with pytest.raises(InputError, match=named) as e:
        initialise(net, PLAIN, tmp_path / "deeplab.pth")
    assert "\n" not in str(e.value) and "deeplab.pth" in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_teacher_of_another_kind_is_one_line(monkeypatch):
    monkeypatch.setitem(TEACHERS, "fcn_resnet50", Kind(teacher_module.torchvision_net("fcn_resnet50"), 2048,
                                                       models.ResNet50_Weights.IMAGENET1K_V2))
    assert parse_options(["--teacher", "fcn_resnet50", "--gpus", "0"]).teacher == "fcn_resnet50"
    torch.manual_seed(0)
    reference = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    net = Teacher("fcn_resnet50", 3)
    net.load_state_dict(reference.state_dict())
    net.freeze()
    x = torch.randn(1, 3, 64, 64)
    T = net(x)
    assert isinstance(T, Outputs) and T.feature.shape == (1, 2048, 8, 8) and T.before_classifier.shape == (1, 512, 8, 8)
    assert torch.equal(T.feature, reference.backbone(x)["out"])
    assert torch.equal(T.logits, reference.classifier(T.feature))
    torch.testing.assert_close(F.interpolate(T.logits, (64, 64), mode="bilinear"), reference(x)["out"])
    # and a student learns from it
    net_S = StudentWithHeads(Student("mit_nano", 3), net.channels)
    pool = AttentionPool(net.channels, teacher_module.pool_grid(net, 64, "cpu")).requires_grad_(False)
    terms = losses.c2vkd(net_S(x), T._replace(embedding=pool(T.feature)), torch.randint(3, (1, 64, 64)))
    losses.total_loss(terms, losses.METHODS["c2vkd"].weights).backward()
    assert all(p.grad.isfinite().all() for p in net_S.parameters())


# ---------------------------------------------------------------- attention pool

def clip_attention_pool(pool, x):
    """CLIP's own form, clip/model.py, class AttentionPool2d."""
    x = x.flatten(2).permute(2, 0, 1)  # NCHW -> (HW)NC
    x = torch.cat([x.mean(0, keepdim=True), x], 0)
    x = x + pool.positional_embedding[:, None, :]
    x, _ = F.multi_head_attention_forward(
        query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=x.shape[-1] // 64,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
        in_proj_weight=None, in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0, out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias, use_separate_proj_weight=True, training=False, need_weights=False)
    return x.squeeze(0)


def test_attention_pool_is_clips():
    torch.manual_seed(0)
    pool, x = AttentionPool(128, grid=3), torch.randn(2, 128, 3, 3)
    torch.testing.assert_close(pool(x), clip_attention_pool(pool, x))
    assert pool(x).shape == (2, 512)


def test_attention_pool_resizes_any_map_to_its_grid():
    torch.manual_seed(0)
    pool, x = AttentionPool(64, grid=2), torch.randn(1, 64, 5, 8)
    resized = F.interpolate(x, (2, 2), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pool(x), clip_attention_pool(pool, resized))


def test_pool_fitter_scores_each_class_by_its_word():
    fitter, x = PoolFitter(64, grid=2, classes=5), torch.randn(3, 64, 4, 4)
    torch.testing.assert_close(fitter(x), fitter.pool(x) @ fitter.words.weight.T + fitter.words.bias)


@pytest.fixture(scope="module")
def clip_state():
    """Half-precision stand-in for CLIP RN101: its pool's tensors, and another that must be ignored."""
    torch.manual_seed(0)
    state = {f"{x}_proj.weight": torch.randn(512 if x == "c" else 2048, 2048) for x in "qkvc"}
    state |= {f"{x}_proj.bias": torch.randn(512 if x == "c" else 2048) for x in "qkvc"}
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    state["positional_embedding"] = torch.randn(50, 2048)
    state["positional_embedding"][1:, 0], state["positional_embedding"][1:, 1] = y.flatten(), x.flatten()
    return {f"visual.attnpool.{k}": v.half() for k, v in state.items()} | {"visual.conv1.weight": torch.zeros(1)}


def test_clip_pool_is_read_with_its_positions_resized(tmp_path, clip_state):
    torch.save(clip_state, tmp_path / "clip.pt")
    pool = load_clip_pool(tmp_path / "clip.pt", 2048, grid=2)
    assert not any(p.requires_grad for p in pool.parameters())
    for name, value in pool.state_dict().items():
        assert value.dtype == torch.float32
        if name != "positional_embedding":
            assert torch.equal(value, clip_state[f"visual.attnpool.{name}"].float())
    mean, *cells = pool.positional_embedding.detach()
    assert torch.equal(mean, clip_state["visual.attnpool.positional_embedding"][0].float())
    # bilinear at the centres of 2x2 cells over 0 ... 6: coordinates 1.25 and 4.75, rows first
    assert [tuple(c[:2].tolist()) for c in cells] == [(1.25, 1.25), (1.25, 4.75), (4.75, 1.25), (4.75, 4.75)]


class Anything(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated, but CLIP's file is of its making
def test_files_other_than_clips_are_refused(tmp_path, clip_state):
    torch.jit.script(Anything()).save(str(tmp_path / "archive.pt"))
    with pytest.raises(InputError, match="neither a plain state dict nor OpenAI's RN101.pt"):
        load_clip_pool(tmp_path / "archive.pt", 2048, 2)
    torch.save(clip_state | {"visual.attnpool.c_proj.weight": torch.zeros(1024, 2048)}, tmp_path / "rn50.pt")
    with pytest.raises(InputError, match="RN50's have another size"):
        load_clip_pool(tmp_path / "rn50.pt", 2048, 2)
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(InputError, match="empty.pt: not CLIP RN101"):
        load_clip_pool(tmp_path / "empty.pt", 2048, 2)
    with pytest.raises(InputError, match="no such file"):
        load_clip_pool(tmp_path / "absent.pt", 2048, 2)
    with pytest.raises(InputError, match="2048 channels"):
        load_clip_pool(tmp_path / "rn50.pt", 64, 2)


def test_presence_names_the_classes_of_each_crop_without_the_ignored_pixels():
    labels = torch.tensor([[[0, 0], [255, 2]], [[255, 255], [1, 255]]])
    assert presence(labels, 3).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_average_precision_is_the_mean_precision_at_the_positives():
    # class 0: positives at ranks 1 and 3 -> (1/1 + 2/3) / 2;  class 1: at rank 2 -> 1/2;  class 2: no positive
    scores = torch.tensor([[0.1, 0.8, 0.3], [0.9, 0.5, 0.2], [0.5, 0.1, 0.1], [0.2, 0.2, 0.4]])
    truth = torch.tensor([[0.0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    found = average_precision(scores, truth)
    torch.testing.assert_close(found, torch.tensor([5 / 6, 1 / 2, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("power", [0.9, 1.0])
def test_schedule_warms_up_linearly_and_decays_to_zero(power):
    factors = [schedule(step, 100, 10, power) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1 and factors[-1] == pytest.approx((1 / 90) ** power) and schedule(100, 100, 10, power) == 0
    assert all(a > b for a, b in zip(factors[10:], factors[11:]))
    assert schedule(1, 20, 10, power) == 1  # at most a tenth of the steps
    assert schedule(0, 5, 10, power) == 1
