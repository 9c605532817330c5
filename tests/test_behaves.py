"What people do with any PyTorch module and any fastai learner works with ours"
from dataclasses import replace
from itertools import product
import copy, pickle
import pytest, torch, torch.nn.functional as F
from accelerate import cpu_offload
from fastai.callback.all import (CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp,
                                 ReduceLROnPlateau, SaveModelCallback)
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage
import fastai.vision.learner  # how top losses are plotted
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import timm
from timm.models import VisionTransformer as ViT
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from sigma_tokenizer import TopK, TopP, create_model, list_models
from sigma_tokenizer.data import Split, digits_data, image_loaders
from sigma_tokenizer.training import (BFloat16, SelfDistillation,
                                      SparsityLoss, create_learner)
from sigma_tokenizer.evaluation import evaluate
from sigma_tokenizer.checkpoint import train
from sigma_tokenizer.stem import PatchTokenizer
from sigma_tokenizer.vit import VisionTransformer
from conftest import slow

def first(split, n): return Split(split.images[:n], split.labels[:n])
digits = digits_data(16); digits = replace(digits, train=first(digits.train, 96), test=first(digits.test, 40))

@pytest.fixture
def learner(tmp_path):
    def make(*cbs, wrap=lambda m: m, **kw):
        m = create_model('msvd_gated', image_size=16, patch_size=4, num_classes=10, embed_dim=16, depth=1, num_heads=2)
        learn = create_learner(wrap(m), image_loaders(digits, 32), **{'cbs': cbs} | kw)
        learn.path = tmp_path; learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else None
        return learn
    return make

ours = dict(budgets=[SelfDistillation], all=[BFloat16, SelfDistillation, lambda: SparsityLoss(.1)])
theirs = dict(mixup=MixUp, cutmix=CutMix, clip=GradientClip, save=SaveModelCallback, stop=EarlyStoppingCallback,
              plateau=ReduceLROnPlateau, accumulate=lambda: GradientAccumulation(64), none=lambda: None)

@pytest.mark.parametrize('other', theirs)
@pytest.mark.parametrize('own', ours)
def test_callbacks_in_any_order(learner, own, other):
    cbs = [make() for make in ours[own]]
    for first in (True, False):
        cb = theirs[other](); learn = learner(*([cb] if first and cb else []), *cbs)
        learn.fit(1, 1e-3, cbs=None if first else cb)
        assert len(learn.recorder.values[-1]) == 3 and not torch.is_autocast_enabled('cpu')

def test_one_callback_needs_no_list(learner): assert any(isinstance(c, BFloat16) for c in learner(cbs=BFloat16()).cbs)

class InProcesses(nn.Module):
    "As torch wraps a model for several processes"
    def __init__(self, module): super().__init__(); self.module = module
    def forward(self, *args): return self.module(*args)

def compiled(m): torch._dynamo.reset(); return torch.compile(m, backend='eager')
def compiled_in_place(m): torch._dynamo.reset(); m.compile(backend='eager'); return m
def both(m): return InProcesses(compiled(m))

@pytest.mark.parametrize('wrap, own', [(InProcesses, 'budgets'), (InProcesses, 'all'), (compiled, 'all'),
                                       *slow((compiled, 'budgets'), (compiled_in_place, 'all'), (both, 'all'))])
def test_wrapped_models(learner, wrap, own):
    learn = learner(*(make() for make in ours[own]), wrap=wrap)
    seen, [head] = [], [part for n, part in learn.model.named_modules() if n.endswith('head.0')]
    head.register_forward_hook(lambda m, i, out: seen.append(out.dtype)); learn.fit(1, 1e-3)
    assert (torch.bfloat16 in seen) == (own == 'all') and {p.dtype for p in learn.model.parameters()} == {torch.float32}

@pytest.mark.parametrize('trained', ['fit', 'train'])
def test_a_learner_afterwards(learner, trained):
    learn = learner(*(make() for make in ours['all'])); n = len(digits.test)
    learn.fit(1, 1e-3) if trained == 'fit' else train(learn, 1, 1e-3, 'constant')
    loss, accuracy = learn.validate()
    preds, targets, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert preds.shape == (n, 10) and abs(losses.mean() - loss) < 1e-4
    assert abs((decoded == targets).float().mean() - accuracy) < 1e-6
    assert targets.tolist() == digits.test.labels.tolist() and torch.allclose(preds.sum(1), torch.ones(n))
    assert learn.get_preds(ds_idx=0)[0].shape == (len(digits.train), 10) and learn.tta()[0].shape == (n, 10)
    image = digits.test.images[0]; PILImage.create(image).save(learn.path/'digit.png')
    for item in (image, PILImage.create(image), learn.path/'digit.png', str(learn.path/'digit.png')):
        name, i, p = learn.predict(item)
        assert torch.allclose(p, preds[0], atol=1e-5) and learn.dls.vocab[int(i)] == name
    new = learn.get_preds(dl=learn.dls.test_dl([*digits.test.images[:5]]))[0]
    assert torch.allclose(new, preds[:5], atol=1e-5)
    learn.show_results(max_n=4); learn.dls.show_batch(max_n=4); learn.summary()
    learn.lr_find(num_it=4, show_plot=False)
    seen = ClassificationInterpretation.from_learner(learn)
    assert seen.confusion_matrix().sum() == n; seen.plot_top_losses(4)
    learn.save('it'); learn.load('it'); learn.fine_tune(1); learn.to_bf16().fit(1)
    assert len(learn.recorder.values[-1]) == 3

def test_export(learner):
    learn = learner(); before = learn.predict(digits.test.images[0])[2]
    learn.export('it.pkl', pickle_module=pickle)
    again = load_learner(learn.path/'it.pkl', pickle_module=pickle)
    assert torch.allclose(again.predict(digits.test.images[0])[2], before)

class NoFloat64(TorchDispatchMode):
    "A device without float64"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        assert not any(isinstance(o, Tensor) and o.dtype == torch.float64 for o in tree_leaves(out)), f
        return out

@pytest.mark.parametrize('keep', [TopK(0), TopK(3), TopP(.5)])
def test_a_budget_needs_no_float64(keep):
    kw = dict(image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    m = create_model('msvd_gated', reduction='rest', **kw).eval()
    with NoFloat64(): m(torch.rand(2, 3, 16, 16), keep=keep)

@pytest.mark.parametrize('name, kw', [('svd', {}), ('fft', dict(energy=.9))])
def test_energies_are_found_on_the_cpu(name, kw, monkeypatch):
    m = create_model(name, image_size=32, embed_dim=16, depth=1, num_heads=2, **kw).eval()
    x, calls = torch.rand(2, 3, 32, 32), []
    want = m(x); monkeypatch.setattr('sigma_tokenizer.tokens.no_float64', {'cpu'})
    monkeypatch.setattr(Tensor, 'cpu', lambda t: calls.append(t) or t)
    assert torch.equal(m(x), want) and calls

small = dict(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
def make(name, **kw):
    torch.manual_seed(0); own = dict(width=8) if 'cnn' in name else {}
    if name != 'timm': return create_model(name, **small | own | kw)
    size = dict(img_size=kw.get('image_size', 32), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    return ViT(**size, in_chans=kw.get('in_chans', 3), dynamic_img_size=True)

everything = ['timm', *list_models()]
every_model = pytest.mark.parametrize('name', everything)
on_a_grid = pytest.mark.parametrize('name', [n for n in everything if n not in ('fft', 'svd')])

@every_model
@pytest.mark.parametrize('chans', [1, 4])
def test_channels(name, chans):
    m, x = make(name, in_chans=chans), torch.rand(2, chans, 32, 32)
    m(x).sum().backward(); assert all(p.grad is not None for p in m.parameters())
    with pytest.raises((ValueError, RuntimeError), match='channels|accepted: .B, '): m(torch.rand(2, 3, 32, 32))

@on_a_grid
def test_image_sizes(name):
    wide = make(name, image_size=(32, 64)).eval()
    assert wide(torch.rand(2, 3, 32, 64)).shape == (2, 5)
    square = make(name).eval()
    for size in ((24, 24), (48, 48), (32, 64)): assert square(torch.rand(2, 3, *size)).shape == (2, 5)
    if name == 'timm': return
    with pytest.raises(ValueError, match='image_size: got'): make(name, image_size=(32, 36))

@pytest.mark.slow
def test_accuracy_at_other_sizes():
    def vit(pos_embed): return VisionTransformer(PatchTokenizer(32, 4, 64), 10, 2, 4, drop_rate=0., pos_embed=pos_embed)
    set_seed(0)
    learn = create_learner(vit('sinusoidal'), image_loaders(digits_data(32), 64), .01)
    train(learn, 8, 3e-3, 'one_cycle')
    def accuracy(side):
        said, _ = evaluate(learn.model, image_loaders(digits_data(side), 64).valid)
        return (said['preds'][0] == said['labels']).mean()
    assert min(map(accuracy, (28, 36, 40))) > .82
    model, learned, x = learn.model.eval(), vit('learned').eval(), torch.rand(2, 3, 36, 28)
    learned.load_state_dict(model.state_dict() | {'pos_embed': model.pos_embed})
    torch.testing.assert_close(learned(x), model(x))

@pytest.mark.parametrize('name', ['fft', 'svd'])
def test_squares_only(name):
    with pytest.raises(ValueError, match=f'as {name} needs squares'): make(name, image_size=(32, 64))
    with pytest.raises(ValueError, match='got 32x64 pixels; accepted: 32x32'): make(name)(torch.rand(2, 3, 32, 64))

@every_model
def test_gradient_checkpointing(name):
    grads = []
    for on in (False, True):
        m = make(name).train(); m.set_grad_checkpointing(on); torch.manual_seed(1)
        m(torch.rand(2, 3, 32, 32)).square().sum().backward(); grads.append([p.grad for p in m.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*grads))

# What people do with timm's ViT. SVD ranks depend on the image: they have no gradient, and no program without a break
cannot = {(what, 'svd') for what in ('compile_fullgraph', 'vmap_over_models', 'vmap_over_images', 'input_gradient',
                                     'per_sample_gradients', 'meta')}
# inside vmap a mask does not say that it needs a gradient; under torch.no_grad() it need not
cannot |= {(what, name) for what in ('vmap_over_models', 'vmap_over_images') for name in list_models() if 'weighted' in name or name == 'glimpse'}
x, y = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
def loss(m, x=x, y=y): return F.cross_entropy(m(x).float(), y)
def has_gradient(p): return p.grad is not None
cases = {}
def case(f): cases[f.__name__] = f; return f

@case
def half(m): assert m.eval().half()(x.half()).isfinite().all()
@case
def bfloat16(m): assert m.eval().bfloat16()(x.bfloat16()).isfinite().all()
@case
def double(m): assert m.eval().double()(x.double()).dtype == torch.float64
@case
def deepcopy(m): m.eval(); close(copy.deepcopy(m)(x), m(x))
@case
def pickled(m): m.eval(); close(pickle.loads(pickle.dumps(m))(x), m(x))
@case
def channels_last(m):
    want, last = m.eval()(x), torch.channels_last
    close(m.to(memory_format=last)(x.contiguous(memory_format=last)), want)
@case
def one_image_in_training(m): m.train()(x[:1]).sum().backward()

@case
def inference_mode(m):
    with torch.inference_mode(): m.eval()(x)
    loss(m.train()).backward()

@case
def another_head(m):
    m.reset_classifier(7); assert m(x).shape == (4, 7)
    m.reset_classifier(0); assert m(x).shape == (4, m.num_features)

@case
def ema(m):
    mean = AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True)
    opt = torch.optim.SGD(m.parameters(), .1)
    for _ in range(2): loss(m).backward(); opt.step(); opt.zero_grad(); mean.update_parameters(m)
    assert mean.eval()(x).isfinite().all()

@case
def gradient_accumulation(m):
    m.eval(); loss(m).backward(); whole = [p.grad for p in m.parameters()]; m.zero_grad()
    for i in (0, 2): (loss(m, x[i:i+2], y[i:i+2])/2).backward()
    for p, g in zip(m.parameters(), whole): close(p.grad, g)

@case
def only_the_head_trains(m):
    m.requires_grad_(False); m.head.requires_grad_(True); loss(m).backward()
    assert [*map(has_gradient, m.parameters())] == [p.requires_grad for p in m.parameters()]

@case
def blocks_are_frozen(m):
    m.blocks.requires_grad_(False); loss(m).backward()
    assert [*map(has_gradient, m.parameters())] == [p.requires_grad for p in m.parameters()]

@case
def state_dict_of_a_meta_model(m):
    for assign in (False, True):
        other = copy.deepcopy(m).to('meta')
        if not assign: other.to_empty(device='cpu')
        other.load_state_dict(m.state_dict(), assign=assign); close(other.eval()(x), m.eval()(x))

@case
def autocast(m):
    with torch.autocast('cpu', torch.bfloat16): value = loss(m)
    value.backward(); assert all(p.grad.isfinite().all() for p in m.parameters())

@case
def spectral_norm(m):
    for part in [*m.modules()]:
        if isinstance(part, nn.Linear): nn.utils.parametrizations.spectral_norm(part)
    loss(m).backward()

@case
def offloading(m): want = m.eval()(x); close(cpu_offload(m, execution_device=torch.device('cpu'))(x), want)

@case
def export_with_any_batch(m):
    batch = torch.export.Dim('batch', min=1, max=64)
    close(torch.export.export(m.eval(), (x,), dynamic_shapes=({0: batch},)).module()(x[:3]), m(x[:3]))

@case
def compile_fullgraph(m):
    torch._dynamo.reset(); m.eval(); close(torch.compile(m, backend='eager', fullgraph=True)(x), m(x))

@case
def compile_and_train(m):
    torch._dynamo.reset(); loss(torch.compile(m, backend='aot_eager')).backward()
    assert all(map(has_gradient, m.parameters()))

def call(m, params, images=x): return torch.func.functional_call(m, params, (images,))
@case
def functional_gradient(m):
    params = {n: p.detach() for n, p in m.eval().named_parameters()}; close(call(m, params), m(x))
    grads = torch.func.grad(lambda p: F.cross_entropy(call(m, p), y))(params)
    assert all(g.isfinite().all() for g in grads.values())

@case
def vmap_over_models(m):
    both, empty = [m.eval(), copy.deepcopy(m)], copy.deepcopy(m).to('meta')
    close(torch.func.vmap(lambda p, b: call(empty, (p, b)))(*torch.func.stack_module_state(both))[1], m(x))

@case
def vmap_over_images(m): m.eval(); close(torch.func.vmap(lambda image: m(image[None])[0])(x), m(x))
@case
def per_sample_gradients(m):
    params = {n: p.detach() for n, p in m.eval().named_parameters()}
    def one(p, image, label): return F.cross_entropy(call(m, p, image[None]), label[None])
    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(params, x, y); loss(m).backward()
    for n, p in m.named_parameters(): close(grads[n].mean(0), p.grad)
@case
def meta(m): assert copy.deepcopy(m).to('meta')(x.to('meta')).shape == m(x).shape
@case
def input_gradient(m):
    images = x.clone().requires_grad_(); m.eval()(images).sum().backward(); assert images.grad.abs().sum() > 0

def quick(what, name):
    "The other models consist of parts of these; timm's ViT shows that a test is right"
    return name in ('vit', 'fft', 'svd', 'msvd_gated') and (what, name) != ('compile_and_train', 'svd')
runs = [run for run in product(cases, everything) if run not in cannot]

@pytest.mark.parametrize('what, name', [run if quick(*run) else slow(run)[0] for run in runs])
def test_as_timms_vit(what, name): cases[what](make(name))

def test_weight_decay_by_timms_rule(learner):
    learn = learner(wd=.1); names = learn.model.no_weight_decay()
    spared = {*map(id, param_groups_weight_decay(learn.model, .1, no_weight_decay_list=names)[0]['params'])}
    learn.fit(1, 1e-3)
    for g in learn.opt.opt.param_groups:
        assert all((id(p) in spared) == (g['weight_decay'] == 0) for p in g['params']) and g['lr'] == 1e-3
    assert len(learn.opt.param_lists) == 1 and learn.opt.hypers[0]['wd'] == .1
    learn.fit(1, slice(1e-3)); learn.fit_one_cycle(1, 1e-3, wd=.2)
    assert learn.opt.opt.param_groups[0]['weight_decay'] == .2

three = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 3))
@pytest.mark.parametrize('head', [nn.Linear(32, 5), nn.Identity(), three])
def test_a_head_that_cannot_be_loaded_is_not_saved(head, tmp_path):
    m = make('msvd'); m.head = head
    with pytest.raises(ValueError, match='got head.*accepted: a head of `reset_cl'): m.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
