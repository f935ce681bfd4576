//! Sessions run kernels in C that follow the calling convention of MLIR's C interface.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::artifact::{BufferId, Entry, Extent, Output, Tensor, Workgroup};
use crate::backend::Allocation;

const KERNELS: &str = r"
#include <stdint.h>
typedef struct { void *allocated, *aligned; int64_t offset, size, stride; } memref;
#define F(i) ((float *)(*(memref **)args[i])->aligned)
#define I(i) ((int32_t *)(*(memref **)args[i])->aligned)
#define N(i) (*(int64_t *)args[i])

/* y = by x */
void _mlir__mlir_ciface_scale(void **args) {
  for (int64_t i = N(3); i < N(4); i++) F(1)[i] = N(2) * F(0)[i];
}
/* y[t] = x[0] + ids[t] + 100 segments[t] */
void _mlir__mlir_ciface_tag(void **args) {
  for (int64_t i = N(4); i < N(5); i++) F(3)[i] = F(0)[0] + I(1)[i] + 100 * I(2)[i];
}
/* values += hyper[0] gradients */
void _mlir__mlir_ciface_update(void **args) {
  for (int64_t i = N(3); i < N(4); i++) F(0)[i] += F(2)[0] * F(1)[i];
}
/* Writes nothing. */
void _mlir__mlir_ciface_idle(void **args) { (void)args; }
";

/// Compiles the kernels; `None` if there is no C compiler, and the tests then pass without running.
fn library() -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let home = tempfile::tempdir().unwrap();
    let (source, library) = (home.path().join("kernels.c"), home.path().join("kernels.so"));
    std::fs::write(&source, KERNELS).unwrap();
    match Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).status() {
        Ok(status) if status.success() => Some((home, library)),
        _ => {
            eprintln!("skipped: no `cc` here to build kernels with");
            None
        }
    }
}

/// A manifest with the tensors `a` [3], frozen, `b` [4,2], of which rows 1..3 train, and `c` [5], trainable with decay.
fn manifest() -> Manifest {
    use Extent::{Const, Sequences, Tokens, Values};
    let tensor = |name: &str, shape: &[u64], trainable, decay| Tensor {
        name: name.into(),
        shape: shape.to_vec(),
        trainable,
        decay,
        lr_factor: None,
    };
    let (mut buffers, f32, i32) = (vec![], Element::F32, Element::I32);
    let mut buffer = |element, shape: Vec<Extent>, storage| {
        buffers.push(Buffer { element, shape, storage });
        buffers.len() - 1
    };
    let a = buffer(f32, vec![Const(3)], Storage::Tensor { index: 0, rows: None });
    let scratch = buffer(f32, vec![Const(3)], Storage::Prepared);
    let packed = buffer(f32, vec![Const(3)], Storage::Prepared);
    let ids = buffer(i32, vec![Tokens], Storage::Input("ids".into()));
    let segments = buffer(i32, vec![Tokens], Storage::Input("segments".into()));
    let tagged = buffer(f32, vec![Tokens], Storage::Temporary);
    let logits = buffer(f32, vec![Tokens], Storage::Temporary);
    let frozen_row = buffer(f32, vec![Const(2)], Storage::Tensor { index: 1, rows: Some((3, 4)) });
    let rows = buffer(f32, vec![Const(2), Const(2)], Storage::Tensor { index: 1, rows: Some((1, 3)) });
    let row = buffer(f32, vec![Const(2)], Storage::Temporary);
    let grad_b = buffer(f32, vec![Const(2), Const(2)], Storage::Gradient { index: 1 });
    let c = buffer(f32, vec![Const(5)], Storage::Tensor { index: 2, rows: None });
    let grad_c = buffer(f32, vec![Const(5)], Storage::Gradient { index: 2 });
    let values = buffer(f32, vec![Values], Storage::Flat(Vector::Values));
    let gradients = buffer(f32, vec![Values], Storage::Flat(Vector::Gradients));
    let hyper = buffer(f32, vec![Const(1)], Storage::Input("hyper".into()));
    let pooled = buffer(f32, vec![Sequences], Storage::Temporary);
    let launch = |kernel, buffers: &[BufferId], extents: &[u64], units| Launch {
        kernel,
        buffers: buffers.to_vec(),
        extents: extents.iter().map(|&n| Const(n)).collect(),
        units,
        group: Workgroup::ONE,
        op: ["scale", "tag", "update", "idle"][kernel].into(),
    };
    let output = |name: &str, buffer, shape| Output { name: name.into(), buffer, shape };
    let train = Entry {
        launches: vec![
            launch(1, &[packed, ids, segments, tagged], &[], Tokens),
            launch(0, &[tagged, logits], &[10], Tokens),
            launch(0, &[frozen_row, row], &[1], Const(2)),
            launch(0, &[rows, grad_b], &[3], Const(4)),
            launch(0, &[c, grad_c], &[5], Const(5)),
        ],
        outputs: vec![output("logits", logits, vec![Tokens]), output("row", row, vec![Const(2)])],
    };
    let limit =
        |input: &str, below| Limit { input: input.into(), below, of: "rows of `a`".into(), except: Some(999_999) };
    let update = Entry { launches: vec![launch(2, &[values, gradients, hyper], &[], Values)], outputs: vec![] };
    let idle = Entry {
        launches: vec![launch(3, &[pooled], &[], Sequences)],
        outputs: vec![output("pooled", pooled, vec![Sequences])],
    };
    Manifest {
        kernels: ["scale", "tag", "update", "idle"].map(String::from).to_vec(),
        tensors: vec![
            tensor("a", &[3], None, false),
            tensor("b", &[4, 2], Some((1, 3)), false),
            tensor("c", &[5], Some((0, 5)), true),
        ],
        limits: vec![limit("ids", Const(1 << 20)), limit("targets", Tokens)],
        prepare: vec![launch(0, &[a, scratch], &[2], Const(3)), launch(0, &[scratch, packed], &[2], Const(3))],
        buffers,
        entries: [("train", train), ("update", update), ("idle", idle)].map(|(n, e)| (n.to_string(), e)).into(),
        ..Manifest::default()
    }
}

fn weights() -> Vec<Numbers> {
    let b: Vec<f32> = (0..8).map(|i| i as f32).collect();
    [&[1.0, 2.0, 3.0][..], &b, &[1.0; 5]].map(Numbers::from).into()
}

fn batch(lengths: &[i32]) -> Inputs {
    let tokens = lengths.iter().sum();
    let ints = [("ids".to_string(), (0..tokens).collect())].into();
    Inputs { lengths: lengths.to_vec(), ints, ..Inputs::default() }
}

fn session(threads: usize) -> Option<(tempfile::TempDir, Session)> {
    let (home, library) = library()?;
    let program = Program::new(manifest(), &library).unwrap();
    Some((home, Session::new(program, weights(), threads).unwrap()))
}

#[test]
fn a_step_computes_outputs_gradients_and_updated_values() {
    let Some((_home, mut session)) = session(2) else { return };
    // `a` was packed in two steps, then freed together with the intermediate result.
    assert!(session.memory.tensors[0].is_none() && session.memory.prepared.len() == 1);
    assert_eq!(session.flat(Vector::Decay).unwrap()[..], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]);

    session.profile = Some(Profile::new());
    session.run("train", &batch(&[2, 1])).unwrap();
    assert_eq!(session.output("logits").unwrap(), (vec![3], Cow::Borrowed(&[40.0, 50.0, 1060.0][..])));
    assert_eq!(session.output("row").unwrap().1[..], [6.0, 7.0]);
    assert_eq!(session.flat(Vector::Gradients).unwrap()[..], [6.0, 9.0, 12.0, 15.0, 5.0, 5.0, 5.0, 5.0, 5.0]);
    assert_eq!(session.profile.as_ref().unwrap()["scale"].1, 4);

    let floats = [("hyper".to_string(), vec![-1.0])].into();
    session.run("update", &Inputs { floats, ..Inputs::default() }).unwrap();
    assert_eq!(session.flat(Vector::Values).unwrap()[..], [-4.0, -6.0, -8.0, -10.0, -4.0, -4.0, -4.0, -4.0, -4.0]);
    assert!(session.peak_bytes() > 0);
}

/// Preparation launches that only dropped entries need are dropped, also indirectly; the others are kept.
#[test]
fn weights_are_packed_for_the_retained_entries_only() {
    let Some((_home, library)) = library() else { return };
    let program = |entries: &[&str]| Program::new(manifest(), &library).unwrap().retain_entries(entries);
    let mut session = Session::new(program(&["update", "idle"]), weights(), 1).unwrap();
    assert!(session.manifest().prepare.is_empty() && session.memory.prepared.is_empty());
    session.run("idle", &batch(&[1])).unwrap();
    assert!(session.run("train", &batch(&[1])).unwrap_err().to_string().contains("it has `idle`, `update`"));
    let mut session = Session::new(program(&["train"]), weights(), 1).unwrap();
    assert_eq!(session.manifest().prepare, manifest().prepare);
    session.run("train", &batch(&[2, 1])).unwrap();
    assert_eq!(session.output("logits").unwrap().1[..], [40.0, 50.0, 1060.0]);
}

/// A partly trained tensor is kept whole only if an entry reads rows of it that do not train.
#[test]
fn frozen_rows_are_uploaded_only_if_they_are_read() {
    let Some((_home, library)) = library() else { return };
    let session = |manifest: Manifest| Session::new(Program::new(manifest, &library).unwrap(), weights(), 1).unwrap();
    assert!(session(manifest()).memory.tensors[1].is_some());
    let mut trained = manifest();
    let train = trained.entries.get_mut("train").unwrap();
    train.launches.remove(2);
    train.outputs.pop();
    let mut session = session(trained);
    assert!(session.memory.tensors[1].is_none());
    session.run("train", &batch(&[2, 1])).unwrap();
    assert_eq!(session.flat(Vector::Gradients).unwrap()[..4], [6.0, 9.0, 12.0, 15.0]);
}

#[test]
fn results_do_not_depend_on_threads_or_earlier_batches() {
    let Some((_home, mut one)) = session(1) else { return };
    let (_home, mut three) = session(3).unwrap();
    for lengths in [&[20_000, 5][..], &[1], &[7, 30_000]] {
        let batch = batch(lengths);
        one.run("train", &batch).unwrap();
        three.run("train", &batch).unwrap();
        assert_eq!(three.output("logits"), one.output("logits"));
    }
}

#[test]
fn poison_reveals_reads_of_memory_that_nothing_wrote() {
    let Some((_home, mut session)) = session(1) else { return };
    session.poison = true;
    for lengths in [[3, 3], [3, 3], [9, 9]] {
        session.run("idle", &batch(&lengths)).unwrap();
        assert!(session.output("pooled").unwrap().1.iter().all(|x| x.is_nan()));
        session.run("train", &batch(&lengths)).unwrap();
        for name in ["logits", "row"] {
            assert!(session.output(name).unwrap().1.iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn wrong_entries_inputs_weights_and_kernels_are_refused() {
    let Some((_home, mut session)) = session(1) else { return };
    let mut refuse = |entry: &str, batch: &Inputs, expected: &str| {
        let message = session.run(entry, batch).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    refuse("decode", &batch(&[1]), "`idle`, `train`, `update`");
    refuse("update", &batch(&[1]), "`hyper`");
    refuse("idle", &Inputs { lengths: vec![2, 0], ..Inputs::default() }, "a sequence of 0 tokens");
    refuse("idle", &Inputs { lengths: vec![50_000], ..Inputs::default() }, "smaller");
    let mut short = batch(&[3]);
    short.ints.insert("ids".into(), vec![1]);
    refuse("train", &short, "`ids`: 1 values where this batch needs 3");
    short.ints.insert("ids".into(), vec![1, -2, 3]);
    refuse("train", &short, "value 1 is -2");
    let mut beyond = batch(&[3]);
    beyond.ints.insert("targets".into(), vec![3]);
    refuse("train", &beyond, "0..3");
    // A padding id is refused although it is in range; the position of a label is that of its target.
    beyond.ints.extend([("targets".into(), vec![2]), ("ids".into(), vec![1, 2, 999_999])]);
    refuse("train", &beyond, "`ids`: value 2 is 999999 (token 2 of sequence 0): tokens of this id are padding");
    let mut two = batch(&[2, 3]);
    two.ints.insert("ids".into(), vec![1, 2, 3, 1 << 20, 4]);
    refuse("train", &two, "`ids`: value 3 is 1048576 (token 1 of sequence 1): it indexes the 1048576 rows of `a`");

    let (home, library) = library().unwrap();
    let message = |program: Result<Program, RuntimeError>| program.err().unwrap().to_string();
    let unknown = Manifest { kernels: vec!["fly".into()], ..Manifest::default() };
    assert!(message(Program::new(unknown, &library)).contains("the kernel `fly`"));
    assert!(message(Program::new(Manifest::default(), &home.path().join("none.so"))).contains("none.so"));
    let mut broken = manifest();
    broken.prepare[0].kernel = 9;
    assert!(message(Program::new(broken, &library)).contains("kernel 9"));
    for (weights, expected) in
        [(vec![], "0 tensors"), (vec![Numbers::zeros(3), Numbers::zeros(8), Numbers::zeros(4)], "`c`")]
    {
        let program = Program::new(manifest(), &library).unwrap();
        let message = Session::new(program, weights, 1).err().unwrap().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

/// A CPU with little memory, which records the most that was allocated at once.
struct Small {
    cpu: Cpu,
    numbers: usize,
    most: Arc<AtomicUsize>,
}

impl Small {
    fn taken(&self) -> usize {
        self.cpu.allocated_bytes() as usize / 4
    }
}

impl Backend for Small {
    fn alloc(&mut self, length: usize) -> Result<Allocation, RuntimeError> {
        let free = self.numbers - self.taken();
        if length > free {
            let (wanted, why, remedy) = (4 * length as u64, "there is no more".into(), "take less".into());
            return Err(RuntimeError::Memory { wanted, free: Some(4 * free as u64), why, remedy });
        }
        let allocation = self.cpu.alloc(length);
        self.most.fetch_max(self.taken(), Ordering::Relaxed);
        allocation
    }
    fn free(&mut self, allocation: Allocation) {
        self.cpu.free(allocation);
    }
    fn write(&mut self, allocation: Allocation, start: usize, words: Words) -> Result<(), RuntimeError> {
        self.cpu.write(allocation, start, words)
    }
    fn read(&self, range: MemoryRange) -> Result<Cow<'_, [f32]>, RuntimeError> {
        self.cpu.read(range)
    }
    fn run(&mut self, jobs: &[BoundLaunch], profile: Option<&mut Profile>) -> Result<(), RuntimeError> {
        self.cpu.run(jobs, profile)
    }
    fn allocated_bytes(&self) -> u64 {
        self.cpu.allocated_bytes()
    }
}

/// A session with this much memory in words, and the most that was allocated.
fn small(manifest: Manifest, weights: Vec<Numbers>, numbers: usize) -> Option<(Session, Arc<AtomicUsize>)> {
    let (_home, library) = library()?;
    let library = Library::load(&library, &manifest.kernels).unwrap();
    let most = Arc::new(AtomicUsize::new(0));
    let backend = Small { cpu: Cpu::new(library, 1).unwrap(), numbers, most: most.clone() };
    Some((Session::with_backend(Box::new(backend), manifest, weights).unwrap(), most))
}

#[test]
fn an_out_of_memory_error_names_the_part_of_the_batch_that_fits() {
    // Each token takes two words of inputs of `train` and two of temporaries.
    let Some((mut session, _)) = small(manifest(), weights(), 7000) else { return };
    let message = session.run("train", &batch(&[100; 20])).unwrap_err().to_string();
    assert!(message.contains("there is no more; of the batch's 20 sequences with 2000 tokens"), "{message}");
    let fit: usize =
        message.split("train.batch=").nth(1).and_then(|rest| rest.split('`').next()).unwrap().parse().unwrap();
    let message = session.run("train", &batch(&[1900])).unwrap_err().to_string();
    assert!(message.contains("1900 tokens in 1 sequences, and no part of it would fit"), "{message}");
    assert!(fit > 6 && session.run("train", &batch(&vec![100; fit + 2])).is_err());
    session.run("train", &batch(&vec![100; fit])).unwrap();
}

/// Two batches, each larger than the other in one extent, fit one at a time, but not a plan for the larger of both
/// extents.
#[test]
fn a_plan_falls_back_to_the_sizes_of_one_batch() {
    let buffer = |shape| Buffer { element: Element::F32, shape: vec![shape], storage: Storage::Temporary };
    let by_sequence = Extent::Sequences * Extent::Const(10);
    let reads = Launch { buffers: vec![0, 1], ..manifest().entries["idle"].launches[0].clone() };
    let manifest = Manifest {
        kernels: manifest().kernels,
        buffers: vec![buffer(Extent::Tokens), buffer(by_sequence)],
        entries: [("idle".to_string(), Entry { launches: vec![reads], outputs: vec![] })].into(),
        ..Manifest::default()
    };
    let Some((mut session, _)) = small(manifest, vec![], 1500) else { return };
    for lengths in [vec![1; 100], vec![1000], vec![1; 100]] {
        session.run("idle", &batch(&lengths)).unwrap();
    }
    assert!(session.run("idle", &batch(&[20; 100])).is_err());
}

#[test]
fn a_batch_can_be_staged_before_outputs_of_the_last_one_are_read() {
    let Some((_home, mut session)) = session(1) else { return };
    session.stage(&["train"], &batch(&[2])).unwrap();
    session.start().unwrap();
    session.stage(&["train", "idle"], &batch(&[1, 3])).unwrap();
    assert_eq!(session.output("logits").unwrap().0, [2]);
    assert!(session.stage(&["train", "fly"], &batch(&[1])).unwrap_err().to_string().contains("`fly`"));
    session.start().unwrap();
    session.wait().unwrap();
    // Entries that run together keep the outputs of all of them.
    assert_eq!(session.outputs(), ["logits", "row", "pooled"]);
    assert_eq!(session.output("logits").unwrap().1[..], [40.0, 1050.0, 1060.0, 1070.0]);
}

/// Frozen weights are uploaded one by one and freed once they are packed.
#[test]
fn weights_never_exist_packed_and_unpacked_at_once() {
    const COUNT: usize = 8;
    let packs = |index: usize| Launch {
        kernel: 0,
        buffers: vec![index, COUNT + index],
        extents: vec![Extent::Const(2)],
        units: Extent::Const(1000),
        group: Workgroup::ONE,
        op: "scale".into(),
    };
    let buffer = |storage| Buffer { element: Element::F32, shape: vec![Extent::Const(1000)], storage };
    let tensors = (0..COUNT).map(|index| buffer(Storage::Tensor { index, rows: None }));
    let reads = Launch { kernel: 3, buffers: (COUNT..2 * COUNT).collect(), ..packs(0) };
    let manifest = Manifest {
        kernels: manifest().kernels,
        tensors: (0..COUNT)
            .map(|i| Tensor { name: i.to_string(), shape: vec![1000], trainable: None, decay: false, lr_factor: None })
            .collect(),
        buffers: tensors.chain((0..COUNT).map(|_| buffer(Storage::Prepared))).collect(),
        prepare: (0..COUNT).map(packs).collect(),
        entries: [("eval".to_string(), Entry { launches: vec![reads], outputs: vec![] })].into(),
        ..Manifest::default()
    };
    let weights = (0..COUNT).map(|_| Numbers::zeros(1000)).collect();
    let Some((session, most)) = small(manifest, weights, 1 << 20) else { return };
    let pages = |numbers: usize| (numbers * 4).next_multiple_of(4096) / 4;
    assert!(most.load(Ordering::Relaxed) <= (COUNT + 1) * pages(1000), "{most:?}");
    assert_eq!(session.memory.tensors.iter().flatten().count(), 0);
}
