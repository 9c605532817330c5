"""Kill a run at random moments, give the same command again, and compare: is every file what a run gives that was never stopped?

    python .ci/kills.py                          20 kills of the preset quick, seed 0; about half an hour on two cores
    python .ci/kills.py --kills 2 --seed 1       fewer, at other moments

First the undisturbed runs, one process (`--jobs 1`) and children side by side (`--jobs 2`). Then, for each kill, a new folder, the same command, SIGKILL for the command alone (not for its children) at a moment drawn evenly from the
undisturbed run's processor time (a clock that other work on the machine does not disturb), and the same command again to its end. Compared are all result files number for number (but for the seconds that they took), and predictions, tables and picture byte for byte. Exit 1 if anything differs.
"""
import argparse, hashlib, json, os, random, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import psutil
from sigma_tokenizer.runs import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--kills', type=int, default=20); parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--side', type=int, default=2, help='kills side by side'); parser.add_argument('--preset', default='quick')
parser.add_argument('--out', type=Path, help='results/robustness/kills.json; nowhere for fewer than 20 kills'); args = parser.parse_args()
if args.out is None and args.kills >= 20: args.out = Path(__file__).parent.parent/'results/robustness/kills.json'
env = os.environ | dict(OMP_NUM_THREADS='1')

def begin(out, jobs):
    "The command"
    command = [Path(sys.executable).with_name('sigma_reproduce'), '--preset', args.preset, '--device', 'cpu', '--jobs', str(jobs), '--out', str(out)]
    with open(f'{out}.log', 'a') as log: return subprocess.Popen(command, stdout=log, stderr=log, env=env)

def timeless(result): return {k: timeless(v) for k, v in result.items() if k != 'seconds'} if isinstance(result, dict) else [timeless(v) for v in result] if isinstance(result, list) else result

def content(out):
    "What a folder holds, comparable; hidden files (the lock) and logs left out"
    files = [p for p in sorted(out.iterdir()) if not p.name.startswith('.') and p.suffix != '.log']
    return {p.name: timeless(json.loads(p.read_text())) if p.suffix == '.json' else hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

def spent(p):
    "Processor seconds of a process, its children, and theirs; None when it has ended"
    total = 0.
    try:
        for q in [p, *p.children(recursive=True)]:
            try: total += sum(q.cpu_times()[:4])
            except psutil.NoSuchProcess:
                if q == p: raise
        return total if p.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess: return None

def until(process, seconds):
    "Wait until that much was spent, or the process ended; what was spent"
    p, last = psutil.Process(process.pid), 0.
    while (now := spent(p)) is not None and now < seconds: last = max(last, now); time.sleep(.02)
    return last if now is None else now

def whole(home, jobs):
    out = home/f'whole-{jobs}'; process = begin(out, jobs); seconds = until(process, float('inf'))
    if process.wait(): sys.exit(f'the undisturbed run failed:\n{Path(f"{out}.log").read_text()[-2000:]}')
    return content(out), seconds

def kill(home, i, jobs, moment, want):
    "One kill, and what came of it"
    out, start, earlier = home/f'kill-{i}', time.time(), random.Random(f'{args.seed} {i}')
    while True:
        p = begin(out, jobs); until(p, moment)
        if p.poll() is None: break
        shutil.rmtree(out); moment = earlier.uniform(0, moment)  # it had ended: once more, and killed earlier
    p.kill(); p.wait()
    left = [q.name for q in out.iterdir()] if out.exists() else []
    then = begin(out, jobs).wait()
    got = content(out) if out.exists() else {}
    differ = sorted(k for k in {*want, *got} if want.get(k) != got.get(k))
    found = dict(kill=i, jobs=jobs, after_processor_seconds=round(moment, 1), results_there=sum(n.endswith('.json') for n in left), checkpoints_there=sum(n.endswith('.ckpt') and '.old.' not in n for n in left),
                 exit_status=then, files=len(want), differ=differ, identical=not differ and then == 0, seconds=round(time.time() - start, 1))
    print(found, flush=True)
    return found

start, draw = time.time(), random.Random(args.seed)
with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(args.side) as pool:
    home = Path(home)
    wholes = dict(zip((1, 2), pool.map(lambda jobs: whole(home, jobs), (1, 2))))
    print({f'--jobs {jobs}': f'{seconds:.0f} processor seconds, {len(files)} files' for jobs, (files, seconds) in wholes.items()}, flush=True)
    moments = [(i, 1 + i % 2, draw.uniform(0, wholes[1 + i % 2][1])) for i in range(args.kills)]
    kills = list(pool.map(lambda m: kill(home, *m, wholes[m[1]][0]), moments))
good = sum(k['identical'] for k in kills)
if args.out: args.out.parent.mkdir(parents=True, exist_ok=True)
if args.out: args.out.write_text(json.dumps(dict(preset=args.preset, seed=args.seed, **provenance('cpu'), minutes=round((time.time() - start)/60, 1), undisturbed_processor_seconds={j: round(s, 1) for j, (_, s) in wholes.items()}, kills=kills), indent=1) + '\n')
print(f'{good} of {len(kills)} identical, {(time.time() - start)/60:.0f} minutes; {args.out or "not written"}')
sys.exit(good < len(kills))
