//! Every product of tensor cores that the paper's specs need, by itself: of a step in f32, which is held against the
//! processor's elsewhere, each product is done again in half precision on the same operands.
//!
//! ```text
//! a step in half precision: not run; its launches, and the packed weights they read
//! the step in f32: launch n    x, W  ─► y
//!                  and beside it  x, the other step's packed W  ─► y' ≈ y
//! ```

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use peft_grammar::model::Precision;
use peft_passes::fuse::Limits;
use peft_passes::kernels::epilogue::Epilogue;
use peft_passes::kernels::gemm::{mma, simt, skinny};
use peft_passes::kernels::{Function, Schedule};
use peft_passes::lower::{Lowered, together};
use peft_passes::target::Machine;
use peft_passes::target::cuda::Chip;
use peft_runtime::artifact::{Element, Storage};
use peft_runtime::backend::Job;
use peft_runtime::{Inputs, Numbers, Session};
use peftc::exchange;
use ptx_sim::{Gpu, Module, Ptr};

use crate::asked;
use crate::paper::{self, Spec, largest};
use crate::ptx::{self, Around, Simulated, Start};

/// A launch of the step that is not run.
struct Twin {
    op: String,
    kernel: String,
    function: Function,
    extents: Vec<u64>,
    units: u64,
    buffers: Vec<Kind>,
}

/// What a buffer of a product is to f32's.
#[derive(PartialEq)]
enum Kind {
    /// The same.
    Same,
    /// The frozen operand, as it was prepared.
    Packed(Vec<u8>),
    /// The other one, rounded.
    Rounded,
    /// There is none: a result as a later product reads it.
    Made,
}

fn is_product(function: &Function) -> bool {
    matches!(function.schedule, Schedule::Mma(_))
}

/// What a product's kernel does with its result.
fn epilogue(function: &Function) -> &Epilogue {
    match &function.schedule {
        Schedule::Mma(product) => &product.epilogue,
        Schedule::Simt(product) => &product.epilogue,
        Schedule::Skinny(product) => &product.epilogue,
        other => panic!("{other:?} is no product"),
    }
}

/// What the kernel writes in half precision: to which of its buffers, of which result of f32's kernel `single`, and
/// whether nothing else is written of that.
fn made(kernel: &Function, single: &Function) -> Vec<(usize, usize, bool)> {
    let groups = epilogue(kernel).groups.iter().zip(&epilogue(single).groups);
    let made = groups.filter_map(|(own, single)| {
        let (_, at) = own.half?;
        Some((at, *single.buffers.last().expect("a result"), !own.stays))
    });
    made.collect()
}

/// Rows of A in bf16, as the product in half precision reads them, from what f32's launch does.
fn rounded(twin: &Twin, single: &Function, start: &Start, a: &[f32]) -> Vec<u8> {
    let mma::Sizes { m, depth, line_a: line, .. } = mma::Sizes::of(&twin.extents).map(|n| n as usize);
    let (along, first) = match &single.schedule {
        Schedule::Skinny(_) => {
            let skinny::Sizes { along_a, first_a, .. } = skinny::Sizes::of(&start.extents);
            (along_a as usize, first_a as usize)
        }
        _ => {
            let simt::Sizes { along_a, first_a, .. } = simt::Sizes::of(&start.extents);
            (along_a as usize, first_a as usize)
        }
    };
    let mut words = vec![0; m * line * 4];
    for row in 0..m {
        for k in 0..depth {
            let x = half::bf16::from_f32(a[first + row * along + k]);
            words[row * line * 4 + 2 * k..][..2].copy_from_slice(&x.to_le_bytes());
        }
    }
    words
}

/// How far a product is from f32's, as a part of the largest number of what it writes.
type Gaps = HashMap<Function, f32>;

/// Both steps of a spec, in f32 and in half precision.
struct Pair {
    spec: Spec,
    single: Lowered,
    half: Lowered,
}

impl Pair {
    fn of(spec: Spec, machine: Machine) -> Pair {
        // Launch by launch they are alike only as long as none are joined.
        let limits = Limits { beside: 1, ..paper::limits() };
        let [single, half] = [Precision::F32, Precision::Bf16].map(|p| spec.lowered(machine, p, limits));
        Pair { spec, single, half }
    }

    fn products(&self) -> HashSet<Function> {
        self.half.functions.iter().filter(|function| is_product(function)).cloned().collect()
    }

    /// Of products that are not among `known` already.
    fn gaps(self, module: &Arc<Module>, known: &mut Gaps) {
        let model = self.spec.model();
        let inputs = exchange::inputs(&paper::batch(&model), [3, 5]);
        let weights = || paper::weights(&model);
        let twins = twins(module, self.half, weights(), &inputs);
        // Behind the last product that is new nothing needs to run.
        let last = twins.iter().rposition(|twin| is_product(&twin.function) && !known.contains_key(&twin.function));
        let Lowered { manifest, functions, .. } = self.single;
        let found = Arc::new(Mutex::new(std::mem::take(known)));
        let prepare = manifest.prepare.clone();
        let (mut twins, gaps) = (twins.into_iter().enumerate(), found.clone());
        let around: Around = Box::new(move |gpu, job, start| {
            if prepare.contains(job.launch) {
                return start.run(gpu);
            }
            let (at, twin) = twins.next().expect("as many launches");
            assert_eq!(twin.op, job.launch.op);
            if Some(at) > last {
                return;
            }
            let mut gaps = gaps.lock().expect("one thread");
            if !is_product(&twin.function) || gaps.contains_key(&twin.function) {
                return start.run(gpu);
            }
            gaps.insert(twin.function.clone(), twin.gap(gpu, job, &functions[job.launch.kernel], start));
        });
        let backend = Simulated::new(module.clone(), &manifest).with(around);
        paper::run(&mut Session::on(Box::new(backend), manifest, weights()).expect("a session"), &inputs);
        *known = std::mem::take(&mut found.lock().expect("one thread"));
    }
}

/// The launches of a step, which is not run.
fn twins(module: &Arc<Module>, program: Lowered, weights: Vec<Numbers>, inputs: &Inputs) -> Vec<Twin> {
    let Lowered { manifest, functions, .. } = program;
    let found = Arc::new(Mutex::new(vec![]));
    let (twins, known) = (found.clone(), manifest.clone());
    let around: Around = Box::new(move |gpu, job, start| {
        if known.prepare.contains(job.launch) {
            return start.run(gpu);
        }
        let function = functions[job.launch.kernel].clone();
        if let Schedule::Round(_) = function.schedule {
            return;
        }
        let places = job.launch.buffers.iter().zip(&start.buffers).zip(&job.places);
        let kinds = places.enumerate().map(|(i, ((&id, &ptr), place))| {
            let buffer = &known.buffers[id];
            match (&buffer.storage, buffer.element) {
                (Storage::Prepared, _) => Kind::Packed(gpu.read(ptr, 4 * place.length).to_vec()),
                (Storage::Temporary, Element::I32) if i == 0 => Kind::Rounded,
                (Storage::Temporary, Element::I32) => Kind::Made,
                _ => Kind::Same,
            }
        });
        let buffers = if is_product(&function) { kinds.collect() } else { vec![] };
        let (op, kernel) = (job.launch.op.clone(), start.kernel.to_string());
        let twin = Twin { op, kernel, function, extents: start.extents.clone(), units: start.units, buffers };
        twins.lock().expect("one thread").push(twin);
    });
    let backend = Simulated::new(module.clone(), &manifest).with(around);
    paper::run(&mut Session::on(Box::new(backend), manifest, weights).expect("a session"), inputs);
    std::mem::take(&mut found.lock().expect("one thread"))
}

impl Twin {
    /// Runs the launch, and this one on a copy of its operands.
    fn gap(&self, gpu: &mut Gpu, job: &Job, single: &Function, start: &Start) -> f32 {
        // A buffer that is given twice is one.
        let mut copies: HashMap<u64, Ptr> = HashMap::new();
        // By buffer of this one, which of the launch's it is.
        let mut of = vec![];
        let mut next = 0..start.buffers.len();
        let made = made(&self.function, single);
        let mut buffers: Vec<Ptr> = vec![];
        for kind in &self.buffers {
            if *kind == Kind::Made {
                let &(_, result, _) = made.iter().find(|(at, ..)| *at == buffers.len()).expect("its epilogue says so");
                if result == next.start {
                    next.next();
                }
                buffers.push(gpu.alloc(vec![0; 2 * job.places[result].length]));
                of.push(result);
                continue;
            }
            let at = next.next().expect("as many buffers");
            of.push(at);
            buffers.push(match kind {
                Kind::Packed(content) => gpu.alloc(content.clone()),
                Kind::Rounded => {
                    let a = ptx::floats(gpu, start.buffers[at], job.places[at].length);
                    gpu.alloc(rounded(self, single, start, &a))
                }
                _ => *copies.entry(start.buffers[at].address()).or_insert_with(|| {
                    let content = gpu.read(start.buffers[at], 4 * job.places[at].length).to_vec();
                    gpu.alloc(content)
                }),
            });
        }
        assert_eq!(next.len(), 0, "buffers of {} and of {}", start.kernel, self.kernel);
        let (kernel, extents) = (&self.kernel[..], self.extents.clone());
        let twin = Start { module: start.module, kernel, buffers, extents, units: self.units, group: start.group };
        twin.run(gpu);
        start.run(gpu);
        let mut worst = 0.0_f32;
        for (i, (kind, &at)) in self.buffers.iter().zip(&of).enumerate() {
            let length = job.places[at].length;
            let passed = made.iter().any(|&(_, result, passed)| passed && result == at);
            let found = match kind {
                Kind::Same if !passed => ptx::floats(gpu, twin.buffers[i], length),
                Kind::Made => {
                    let halves = gpu.read(twin.buffers[i], 2 * length).chunks_exact(2);
                    halves.map(|x| half::bf16::from_le_bytes([x[0], x[1]]).to_f32()).collect()
                }
                _ => continue,
            };
            let want = ptx::floats(gpu, start.buffers[at], length);
            if want != found {
                let apart = want.iter().zip(&found).map(|(x, y)| x - y);
                worst = largest([worst, largest(apart) / largest(want.iter().copied())]);
            }
        }
        let copies: BTreeSet<u64> = twin.buffers.iter().map(|copy| copy.address()).collect();
        copies.into_iter().for_each(|copy| gpu.free(Ptr::at(copy)));
        worst
    }
}

fn every_product(chip: Chip, bound: f32) {
    let machine = Machine::Cuda(chip);
    let pairs: Vec<Pair> = paper::specs().iter().flat_map(Spec::small).map(|spec| Pair::of(spec, machine)).collect();
    let wanted: HashSet<Function> = pairs.iter().flat_map(Pair::products).collect();
    let mut chosen = paper::covering(pairs, Pair::products);
    let kernels = together(chosen.iter_mut().flat_map(|pair| [&mut pair.single, &mut pair.half]));
    let module = ptx::module(&kernels, machine);
    let mut gaps = Gaps::new();
    for pair in chosen {
        pair.gaps(&module, &mut gaps);
    }
    for (function, gap) in &gaps {
        println!("{gap:.1e} {}", function.word());
    }
    let all = wanted.len() > 10 && gaps.len() == wanted.len() && gaps.keys().all(|ran| wanted.contains(ran));
    assert!(all, "{} of {} products ran", gaps.len(), wanted.len());
    let wrong: Vec<_> = gaps.iter().filter(|(_, gap)| !(0.0..=bound).contains(*gap)).collect();
    assert!(wrong.is_empty(), "beyond {bound:e}: {wrong:#?}");
    // Something was rounded.
    assert!(gaps.values().all(|gap| *gap > 0.0));
}

#[test]
fn every_product_in_f16() {
    every_product(Chip::Sm70, 1e-3);
}

/// bf16 has three bits less.
#[test]
fn every_product_in_bf16() {
    if asked("PEFTC_FULL").is_none() {
        return;
    }
    every_product(Chip::Sm80, 8e-3);
}
