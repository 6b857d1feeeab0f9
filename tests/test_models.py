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
from student import (VARIANTS, Attention, Block, Encoder, Student, StudentWithHeads,
                     count_parameters, load_encoder)
from teacher import (TEACHERS, AttentionPool, Kind, PoolFitter, Teacher, initialise,
                     load_clip_pool, presence)

BLOCK = ("norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.dwconv.dwconv",
         "mlp.fc2")
HUGGING_FACE = {
    "norm1": "layer_norm_1", "attn.q": "attention.self.query",
    "attn.proj": "attention.output.dense", "attn.sr": "attention.self.sr",
    "attn.norm": "attention.self.layer_norm", "norm2": "layer_norm_2", "mlp.fc1": "mlp.dense1",
    "mlp.dwconv.dwconv": "mlp.dwconv.dwconv", "mlp.fc2": "mlp.dense2"}


def official_names(variant):
    """The tensors of the official PVTv2 and MiT files, without the classifier."""
    v = VARIANTS[variant]
    layers = []
    for i in range(4):
        layers += [f"patch_embed{i + 1}.proj", f"patch_embed{i + 1}.norm", f"norm{i + 1}"]
        parts = BLOCK + (("attn.sr", "attn.norm") if v.reductions[i] > 1 else ())
        layers += [f"block{i + 1}.{j}.{part}" for j in range(v.depths[i]) for part in parts]
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

@pytest.mark.parametrize("variant, count", [
    ("mit_b0", 3_319_392), ("mit_b1", 13_151_424), ("pvt_v2_b0", 3_409_760),
    ("pvt_v2_b1", 13_496_000)])
def test_networks_have_the_published_parameter_counts(variant, count):
    with torch.device("meta"):
        assert count_parameters(Encoder(variant)) == count
        if variant == "mit_b0":
            assert count_parameters(Student(variant, 150)) == 3_752_694


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoders_have_the_official_names_and_their_strides_and_channels(variant):
    with torch.device("meta"):
        encoder = Encoder(variant)
        maps = encoder(torch.empty(2, 3, 64, 96))
    assert set(encoder.state_dict()) == official_names(variant)
    strides = (2, 4, 8, 8) if variant == "mit_nano" else (4, 8, 16, 32)
    wanted = [(2, c, 64 // s, 96 // s) for c, s in zip(VARIANTS[variant].dims, strides)]
    assert [tuple(m.shape) for m in maps] == wanted


@pytest.mark.parametrize("h, w", [(32, 32), (33, 65), (97, 50)])
def test_student_takes_any_size_and_rounds_its_maps_up(h, w):
    S = Student("mit_nano", 5).eval()(torch.randn(1, 3, h, w))
    fine, coarse = (math.ceil(h / 2), math.ceil(w / 2)), (math.ceil(h / 8), math.ceil(w / 8))
    assert S.logits.shape == (1, 5, *fine) and S.before_classifier.shape == (1, 128, *fine)
    assert S.feature.shape == (1, 192, *coarse)
    assert S.projected is S.embedding is None
    assert S.logits.isfinite().all()


@pytest.mark.parametrize("sr", [1, 2])
def test_attention_is_softmax_qk_over_root_d_times_v(sr):
    torch.manual_seed(0)
    B, C, heads, h, w = 2, 8, 2, 4, 6
    d = C // heads
    attention, x = Attention(C, heads, sr), torch.randn(B, h * w, C)
    reduced = x
    if sr > 1:
        reduced = attention.sr(x.transpose(1, 2).reshape(B, C, h, w))
        reduced = attention.norm(reduced.flatten(2).transpose(1, 2))
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
    with torch.device("meta"):
        encoder = Encoder("mit_b0")
    drops = [block.drop for i in (1, 2, 3, 4) for block in getattr(encoder, f"block{i}")]
    assert drops == pytest.approx([0.1 * i / 7 for i in range(8)])  # linearly to a tenth


def test_layer_norms_have_the_official_epsilons():
    with torch.device("meta"):
        encoder = Encoder("mit_b0")
    norms = {name: m.eps for name, m in encoder.named_modules() if isinstance(m, nn.LayerNorm)}
    coarse = {n for n in norms if n.startswith("patch_embed") or n.endswith("attn.norm")}
    assert len(coarse) == 4 + 6
    assert all(eps == (1e-5 if name in coarse else 1e-6) for name, eps in norms.items())


def test_the_decoder_is_the_one_that_concatenates_and_then_fuses():
    torch.manual_seed(0)
    net = Student("mit_b0", 5).eval()
    decoder = net.decoder
    for value in (decoder.norm.weight, decoder.norm.bias, decoder.norm.running_mean):
        nn.init.normal_(value)
    with torch.no_grad():
        maps = net.encoder(torch.randn(2, 3, 66, 97))
        size = maps[0].shape[2:]
        parts = [F.interpolate(linear(x), size, mode="bilinear", align_corners=False)
                 for linear, x in zip(decoder.linears, maps)]
        fused = F.relu(decoder.norm(decoder.fuse(torch.cat(parts[::-1], 1))))
        logits, before = decoder(maps)
        wanted = decoder.classifier(fused)
    assert (before - fused).abs().max() < 1e-5 * fused.abs().max()
    assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_heads_do_not_change_the_start_of_the_student():
    def start(c_teacher):
        torch.manual_seed(3)
        return StudentWithHeads(Student("mit_nano", 2), c_teacher, seed=3), torch.rand(4)

    (alone, after_alone), (taught, after_taught) = start(None), start(16)
    pairs = zip(alone.student.parameters(), taught.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(after_alone, after_taught)
    x = torch.randn(2, 3, 64, 32)
    one, other = alone.eval()(x), taught.eval()(x)
    assert one.projected is one.embedding is None
    assert other.projected.shape == (2, 16, 8, 4) and other.embedding.shape == (2, 512)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3]))


def test_the_heads_are_1x1_convolutions_and_the_average_pool_before_one():
    torch.manual_seed(0)
    needs = "teacher", "A_v", "A_l", "earlier"
    net = StudentWithHeads(Student("mit_nano", 2), 16, 0, needs, (5, 7)).eval()
    x = torch.randn(2, 3, 64, 32)
    S = net(x)
    weights = {n: w[:, :, 0, 0] for n, w in net.heads.named_parameters()}
    assert weights.keys() == {"A_v.weight", "A_l.weight", "earlier.0.weight", "earlier.1.weight"}

    def project(name, x):
        return torch.einsum("tc,bchw->bthw", weights[name], x)

    maps = net.student(x).earlier
    torch.testing.assert_close(S.projected, project("A_v.weight", S.feature))
    torch.testing.assert_close(S.embedding, S.feature.mean((2, 3)) @ weights["A_l.weight"].T)
    for i, projected in enumerate(S.earlier):
        torch.testing.assert_close(projected, project(f"earlier.{i}.weight", maps[1 + i]))
    assert len(maps) == 3 and len(S.earlier) == 2


def test_the_map_before_the_classifier_gives_the_logits():
    net, teacher = Student("mit_nano", 3).eval(), Teacher("deeplabv3_resnet10", 3).eval()
    S, T = (network(torch.randn(1, 3, 32, 32)) for network in (net, teacher))
    torch.testing.assert_close(net.decoder.classifier(S.before_classifier), S.logits)
    torch.testing.assert_close(teacher.classifier[-1](T.before_classifier), T.logits)


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
    left = load_encoder(target, "mit_b0", tmp_path / "pytorch_model.bin")
    assert left == ["classifier.bias", "classifier.weight"]
    assert same_function(source, target)
    prefix = "segformer.encoder.block.2.1.attention.self"
    rows = torch.cat([state[f"{prefix}.key.weight"], state[f"{prefix}.value.weight"]])
    assert torch.equal(target.block3[1].attn.kv.weight, rows)


def without(state, ending):
    return {k: v for k, v in state.items() if not k.endswith(ending)}


def without_auxiliary_head(state):
    return {k: v for k, v in state.items() if not k.startswith("aux_classifier.")}


@pytest.mark.parametrize("change, named", [
    (lambda e: without(e.state_dict(), "block2.0.mlp.fc1.bias"), "block2.0.mlp.fc1.bias"),
    (lambda e: without(hugging_face_file(e), "block.2.1.attention.self.value.weight"),
     "block3.1.attn.kv.weight"),
    (lambda e: e.state_dict() | {"block9.weight": torch.zeros(1)}, "block9.weight"),
    (lambda e: random_encoder("mit_b0").state_dict(), "give --student the network of the file"),
], ids=["key missing", "value rows missing", "unknown key", "another variant"])
def test_file_that_does_not_fit_the_encoder_is_refused_in_one_line(tmp_path, change, named):
    encoder = random_encoder()
    torch.save(change(encoder), tmp_path / "w.pth")
    with pytest.raises(InputError) as e:
        load_encoder(encoder, "mit_nano", tmp_path / "w.pth")
    assert named in str(e.value) and "w.pth" in str(e.value) and "\n" not in str(e.value)


def test_imagenet_files_that_share_a_name_are_cached_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    sources = {name: random_encoder(name, seed=5) for name in ("mit_b0", "mit_nano")}
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
    with pytest.raises(InputError, match="absent.pth.*--student-weights none"):
        load_encoder(random_encoder("mit_b0"), "mit_b0", "imagenet")


# ---------------------------------------------------------------- teacher

@pytest.mark.parametrize("name, stride", [
    ("deeplabv3_resnet101", 8), ("deeplabv3_resnet50", 8), ("deeplabv3_mobilenet_v3_large", 16),
    ("deeplabv3_mobilenet_v2", 16), ("deeplabv3_resnet10", 8)])
def test_teacher_has_its_stride_and_channels(name, stride):
    with torch.device("meta"):
        net = Teacher(name, 7).eval()
        T = net(torch.empty(2, 3, 64, 96))
    h, w = 64 // stride, 96 // stride
    channels = TEACHERS[name].channels
    assert net.channels == channels and T.projected is T.embedding is None
    wanted = [(2, 7, h, w), (2, channels, h, w), (2, 256, h, w)]
    assert [tuple(t.shape) for t in T[:3]] == wanted


def test_teacher_logits_are_torchvisions_before_its_upsampling():
    name = "deeplabv3_mobilenet_v3_large"
    torch.manual_seed(0)
    reference = segmentation.__dict__[name](weights=None, weights_backbone=None, num_classes=3)
    net = Teacher(name, 3).eval()
    net.load_state_dict(reference.eval().state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = F.interpolate(net(x).logits, (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, reference(x)["out"])


@pytest.mark.parametrize("name, file_of, prefix, left", [
    ("deeplabv3_mobilenet_v2", models.mobilenet_v2, "features.", "18, classifier"),
    ("deeplabv3_resnet50", models.resnet50, "", "fc")])
def test_a_backbones_file_fills_the_backbone(tmp_path, capsys, name, file_of, prefix, left):
    torch.manual_seed(0)
    state = file_of(weights=None).state_dict()
    net = Teacher(name, 2)
    torch.save(state, tmp_path / "backbone.pth")
    initialise(net, name, tmp_path / "backbone.pth")
    assert capsys.readouterr().out.endswith(f" tensors of {left}\n")
    assert all(torch.equal(v, state[prefix + k]) for k, v in net.backbone.state_dict().items())


def test_voc_model_is_downloaded_whole_without_its_auxiliary_head(tmp_path, monkeypatch, capsys):
    name = "deeplabv3_mobilenet_v3_large"
    torch.manual_seed(0)
    state = Teacher(name, 21).state_dict()
    torch.save(state | {"aux_classifier.0.weight": torch.zeros(1)}, tmp_path / "voc.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    published = {"COCO_WITH_VOC_LABELS_V1": SimpleNamespace(url=(tmp_path / "voc.pth").as_uri())}
    monkeypatch.setattr(models, "get_model_weights", {name: published}.get)
    net = Teacher(name, 21)
    initialise(net, name, "voc")
    assert "not loaded: 1 tensors of aux_classifier" in capsys.readouterr().out
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name, source", [
    ("deeplabv3_resnet10", "imagenet"), ("deeplabv3_resnet10", "voc"),
    ("deeplabv3_mobilenet_v2", "voc")])
def test_weights_that_nobody_published_are_refused(name, source):
    with pytest.raises(InputError, match=f"{name} has no published .*weights"):
        initialise(None, name, source)


PLAIN = "deeplabv3_mobilenet_v3_large"


@pytest.fixture(scope="module")
def torchvision_state():
    """The state dict of torchvision's own model with an auxiliary head, three classes."""
    torch.manual_seed(0)
    return segmentation.__dict__[PLAIN](weights=None, weights_backbone=None, num_classes=3,
                                        aux_loss=True).state_dict()


def test_an_old_torchvision_file_fills_the_teacher_and_says_what_it_left_aside(
        tmp_path, torchvision_state, capsys):
    torch.save(without(torchvision_state, "num_batches_tracked"), tmp_path / "deeplab.pth")
    net = Teacher(PLAIN, 3)
    initialise(net, PLAIN, tmp_path / "deeplab.pth")
    text = capsys.readouterr().out
    assert "deeplab.pth; not loaded: " in text and text.endswith(" tensors of aux_classifier\n")
    assert all(torch.equal(v, torchvision_state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("change, named", [
    (lambda s: {k: v[:2] if k.startswith("classifier.4.") else v for k, v in s.items()},
     "classifier.4."),
    (lambda s: without(s, "backbone.0.0.weight"), "backbone.0.0.weight"),
    (lambda s: s | {"module.epoch": torch.zeros(1)}, "module.epoch"),
    (lambda s: Teacher("deeplabv3_resnet10", 3).state_dict(),
     f"{PLAIN} with the classes of this data set"),
], ids=["two classes", "key missing", "unknown key", "another network"])
def test_file_that_does_not_fit_the_teacher_is_refused_in_one_line(tmp_path, torchvision_state,
                                                                   change, named):
    torch.save(change(torchvision_state), tmp_path / "deeplab.pth")
    with pytest.raises(InputError) as e:
        initialise(Teacher(PLAIN, 3), PLAIN, tmp_path / "deeplab.pth")
    text = str(e.value)
    assert named in text and "deeplab.pth" in text and "\n" not in text


def fcn(classes):
    """A teacher of another kind, with a map besides F^T."""
    return segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=classes,
                                     aux_loss=True)


@pytest.mark.parametrize("earlier", [(), (1024,)], ids=["F^T alone", "two depths"])
def test_a_teacher_of_another_kind_is_one_entry(monkeypatch, earlier):
    monkeypatch.setitem(TEACHERS, "fcn_resnet50", Kind(fcn, 2048, earlier=earlier))
    torch.manual_seed(0)
    reference = fcn(3).eval()
    net = Teacher("fcn_resnet50", 3)
    net.load_state_dict(without_auxiliary_head(reference.state_dict()))
    net.freeze()
    x = torch.randn(2, 3, 64, 64)
    T = net(x)
    maps = reference.backbone(x)
    assert isinstance(T, Outputs) and T.before_classifier.shape == (2, 512, 8, 8)
    assert torch.equal(T.feature, maps["out"]) and len(T.earlier) == len(earlier)
    assert all(torch.equal(a, maps["aux"]) for a in T.earlier)
    assert torch.equal(T.logits, reference.classifier(T.feature))
    # and a student learns from it
    row = losses.METHODS["c2vkd_multi"]
    taught = StudentWithHeads(Student("mit_nano", 3), net.channels, 0, row.needs, net.earlier)
    grid = teacher_module.pool_grid(net, 64, "cpu")
    pool = AttentionPool(net.channels, grid).requires_grad_(False)
    terms = row.function(taught(x), T._replace(embedding=pool(T.feature)),
                         torch.randint(3, (2, 64, 64)))
    losses.total_loss(terms, row.weights).backward()
    assert all(p.grad.isfinite().all() for p in taught.parameters())


@pytest.mark.parametrize("channels, earlier, named", [
    (0, (), "channels=0: .* multiple of 64"), (100, (), "channels=100: .* multiple of 64"),
    (64, (8, 16, 32, 64), "earlier=.* three stages")])
def test_a_teacher_that_no_student_can_meet_is_refused_where_it_is_entered(channels, earlier,
                                                                           named):
    with pytest.raises(ValueError, match=named):
        Kind(fcn, channels, earlier=earlier)


# ---------------------------------------------------------------- attention pool

def clip_attention_pool(pool, x):
    """CLIP's own form, clip/model.py, class AttentionPool2d."""
    x = x.flatten(2).permute(2, 0, 1)  # NCHW -> (HW)NC
    x = torch.cat([x.mean(0, keepdim=True), x], 0)
    x = x + pool.positional_embedding[:, None, :]
    x, _ = F.multi_head_attention_forward(
        query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=x.shape[-1] // 64,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight, in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0,
        out_proj_weight=pool.c_proj.weight, out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True, training=False, need_weights=False)
    return x.squeeze(0)


@pytest.mark.parametrize("h, w", [(3, 3), (5, 8)])
def test_attention_pool_is_clips_on_a_map_resized_to_its_grid(h, w):
    torch.manual_seed(0)
    pool, x = AttentionPool(128, grid=3), torch.randn(2, 128, h, w)
    resized = F.interpolate(x, (3, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pool(x), clip_attention_pool(pool, resized))
    assert pool(x).shape == (2, 512)


def test_pool_fitter_scores_each_class_by_its_word():
    fitter, x = PoolFitter(64, grid=2, classes=5), torch.randn(3, 64, 4, 4)
    wanted = fitter.pool(x) @ fitter.words.weight.T + fitter.words.bias
    torch.testing.assert_close(fitter(x), wanted)


@pytest.fixture(scope="module")
def clip_state():
    """Stand-in for CLIP RN101 in half precision: its pool, and a tensor to be ignored."""
    torch.manual_seed(0)
    state = {f"{x}_proj.weight": torch.randn(512 if x == "c" else 2048, 2048) for x in "qkvc"}
    state |= {f"{x}_proj.bias": torch.randn(512 if x == "c" else 2048) for x in "qkvc"}
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    places = state["positional_embedding"] = torch.randn(50, 2048)
    places[1:, 0], places[1:, 1] = y.flatten(), x.flatten()
    found = {f"visual.attnpool.{k}": v.half() for k, v in state.items()}
    return found | {"visual.conv1.weight": torch.zeros(1)}


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
    found = [tuple(c[:2].tolist()) for c in cells]
    assert found == [(1.25, 1.25), (1.25, 4.75), (4.75, 1.25), (4.75, 4.75)]


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, OpenAI's file is older
@pytest.mark.parametrize("content, channels, found", [
    (None, 2048, "no such file; give --clip"),
    (b"no checkpoint", 2048, "neither a plain state dict nor OpenAI's RN101.pt"),
    ("TorchScript", 2048, "nor OpenAI's RN101.pt (sha256"),
    ({"weight": torch.zeros(1)}, 2048, "not CLIP RN101"),
    ([torch.zeros(1)], 2048, "not CLIP RN101"),
    ({1: 2}, 2048, "not CLIP RN101"),
    ("RN50", 2048, "RN50's tensors have other sizes"),
    ("RN101", 960, "--clip needs a ResNet teacher")])
def test_a_file_that_is_not_clip_rn101_is_refused(tmp_path, clip_state, content, channels, found):
    path = tmp_path / "RN101.pt"
    if content == "TorchScript":
        torch.jit.script(nn.Linear(1, 1)).save(str(path))
    elif content == "RN50":
        torch.save(clip_state | {"visual.attnpool.c_proj.weight": torch.zeros(1024, 2048)}, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError) as e:
        load_clip_pool(path, channels, grid=1)
    assert found in str(e.value) and "\n" not in str(e.value)


def test_presence_names_the_classes_of_each_crop_without_the_ignored_pixels():
    labels = torch.tensor([[[0, 0], [255, 2]], [[255, 255], [1, 255]]])
    assert presence(labels, 3).tolist() == [[1, 0, 1], [0, 1, 0]]
