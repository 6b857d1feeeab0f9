"""Student, teacher and attention pool against the published names, counts and reference forms."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models import segmentation

import student
from data import InputError
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


@pytest.mark.parametrize("h, w", [(33, 65), (97, 50)])
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


def test_a_block_adds_its_attention_and_then_its_feed_forward_part():
    torch.manual_seed(0)
    block, x = Block(8, 2, 1, 4, drop=0), torch.randn(2, 24, 8)
    y = x + block.attn(block.norm1(x), 4, 6)
    hidden = block.mlp.fc1(block.norm2(y)).transpose(1, 2).reshape(2, 32, 4, 6)
    hidden = F.gelu(block.mlp.dwconv.dwconv(hidden)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(x, 4, 6), y + block.mlp.fc2(hidden))


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
    biases = [linear.bias for linear in decoder.linears]  # they begin at 0
    for value in (decoder.norm.weight, decoder.norm.bias, decoder.norm.running_mean, *biases):
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


def test_hugging_face_files_load_strictly_though_they_share_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for variant in "mit_b0", "mit_nano":
        source, target = random_encoder(variant, seed=5), random_encoder(variant, seed=6)
        state = hugging_face_file(source)
        assert variant == "mit_nano" or len(state) == 194
        path = tmp_path / "nvidia" / variant / "resolve" / "main" / "pytorch_model.bin"
        path.parent.mkdir(parents=True)
        torch.save(state, path)
        monkeypatch.setitem(student.IMAGENET, variant, path.as_uri())
        left = load_encoder(target, variant, "imagenet")
        assert left == ["classifier.bias", "classifier.weight"]
        assert same_function(source, target)


def test_file_that_does_not_fit_the_encoder_is_refused(tmp_path):
    encoder = random_encoder()
    state = hugging_face_file(encoder)
    del state["segformer.encoder.block.2.1.attention.self.value.weight"]
    torch.save(state, tmp_path / "w.pth")
    words = "w.pth: not the encoder of mit_nano: .*block3.1.attn.kv.weight.*; give --student"
    with pytest.raises(InputError, match=words):
        load_encoder(encoder, "mit_nano", tmp_path / "w.pth")


def test_failed_download_names_the_option_that_avoids_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(student.IMAGENET, "mit_b0", (tmp_path / "absent.pth").as_uri())
    with pytest.raises(InputError, match="absent.pth.*--student-weights none"):
        load_encoder(random_encoder("mit_b0"), "mit_b0", "imagenet")


# ---------------------------------------------------------------- teacher

def test_teacher_logits_are_torchvisions_before_its_upsampling():
    name = "deeplabv3_mobilenet_v3_large"
    torch.manual_seed(0)
    reference = segmentation.__dict__[name](weights=None, weights_backbone=None, num_classes=3)
    net, x = Teacher(name, 3), torch.randn(2, 3, 64, 64)
    net.load_state_dict(reference.state_dict())
    for layer in *net.modules(), *reference.modules():
        layer.training = isinstance(layer, nn.BatchNorm2d)  # or untrained maps would be near 0
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
    ("deeplabv3_resnet10", "imagenet"), ("deeplabv3_mobilenet_v2", "voc")])
def test_weights_that_nobody_published_are_refused(name, source):
    with pytest.raises(InputError, match=f"{name} has no published .*weights"):
        initialise(None, name, source)


@pytest.mark.parametrize("earlier", [(), (1024,)], ids=["F^T alone", "two depths"])
def test_a_teacher_of_another_kind_is_one_entry(monkeypatch, earlier):
    def build(classes):  # its backbone gives a map besides F^T
        return segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=classes,
                                         aux_loss=True)

    monkeypatch.setitem(TEACHERS, "fcn_resnet50", Kind(build, 2048, earlier=earlier))
    torch.manual_seed(0)
    net = Teacher("fcn_resnet50", 3).freeze()
    x = torch.randn(1, 3, 64, 64)
    T, maps = net(x), net.backbone(x)
    assert torch.equal(T.feature, maps["out"]) and len(T.earlier) == len(earlier)
    assert all(torch.equal(a, maps["aux"]) for a in T.earlier)
    assert torch.equal(T.logits, net.classifier(T.feature))
    assert torch.equal(T.logits, net.classifier[-1](T.before_classifier))


@pytest.mark.parametrize("channels, earlier, named", [
    (0, (), "channels=0: .* multiple of 64"), (100, (), "channels=100: .* multiple of 64"),
    (64, (8, 16, 32, 64), "earlier=.* three stages")])
def test_a_teacher_that_no_student_can_meet_is_refused_where_it_is_entered(channels, earlier,
                                                                           named):
    with pytest.raises(ValueError, match=named):
        Kind(None, channels, earlier=earlier)


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


def test_attention_pool_is_clips_on_a_map_resized_to_its_grid():
    torch.manual_seed(0)
    pool, x = AttentionPool(128, grid=3), torch.randn(2, 128, 5, 8)
    resized = F.interpolate(x, (3, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pool(x), clip_attention_pool(pool, resized))
    assert pool(x).shape == (2, 512)


def test_pool_fitter_scores_each_class_by_its_word():
    fitter, x = PoolFitter(64, grid=2, classes=5), torch.randn(3, 64, 4, 4)
    wanted = fitter.pool(x) @ fitter.words.weight.T + fitter.words.bias
    torch.testing.assert_close(fitter(x), wanted)


def test_clip_pool_is_read_with_its_positions_resized(tmp_path):
    torch.manual_seed(0)
    state = {f"{x}_proj.weight": torch.randn(512 if x == "c" else 2048, 2048) for x in "qkvc"}
    state |= {f"{x}_proj.bias": torch.randn(512 if x == "c" else 2048) for x in "qkvc"}
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    places = state["positional_embedding"] = torch.randn(50, 2048)
    places[1:, 0], places[1:, 1] = y.flatten(), x.flatten()
    state = {name: value.half() for name, value in state.items()}  # as in OpenAI's file
    file = {f"visual.attnpool.{name}": value for name, value in state.items()}
    torch.save(file | {"visual.conv1.weight": torch.zeros(1)}, tmp_path / "clip.pt")

    pool = load_clip_pool(tmp_path / "clip.pt", 2048, grid=2)
    assert not any(p.requires_grad for p in pool.parameters())
    mean, *cells = pool.positional_embedding.detach()
    assert torch.equal(mean, state.pop("positional_embedding")[0].float())
    # bilinear at the centres of 2x2 cells over 0 ... 6: coordinates 1.25 and 4.75, rows first
    found = [tuple(c[:2].tolist()) for c in cells]
    assert found == [(1.25, 1.25), (1.25, 4.75), (4.75, 1.25), (4.75, 4.75)]
    for name, value in state.items():
        assert torch.equal(pool.state_dict()[name], value.float())


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, OpenAI's file is older
@pytest.mark.parametrize("content, channels, found", [
    (None, 2048, "no such file; give --clip"),
    ("TorchScript", 2048, "neither a plain state dict nor OpenAI's RN101.pt"),
    ([torch.zeros(1)], 2048, "not CLIP RN101"), ({1: 2}, 2048, "not CLIP RN101"),
    ("another teacher", 960, "--clip needs a ResNet teacher")])
def test_a_file_that_is_not_clip_rn101_is_refused(tmp_path, content, channels, found):
    path = tmp_path / "RN101.pt"
    if content == "TorchScript":
        torch.jit.script(nn.Linear(1, 1)).save(str(path))
    elif content:
        torch.save(content, path)
    with pytest.raises(InputError, match=found):
        load_clip_pool(path, channels, grid=1)


def test_presence_names_the_classes_of_each_crop_without_the_ignored_pixels():
    labels = torch.tensor([[[0, 0], [255, 2]], [[255, 255], [1, 255]]])
    assert presence(labels, 3).tolist() == [[1, 0, 1], [0, 1, 0]]
