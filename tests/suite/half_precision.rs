//! Every tensor-core gemm of the paper's specs, tested separately. During a step in f32, which other tests compare with
//! the CPU's, each gemm is repeated in half precision on the same operands.
//!
//! ```text
//! the step in half precision: only its launches and its packed weights are recorded
//! the step in f32: launch n    x, W  ─► y
//!                  repeated as  x, packed W  ─► y' ≈ y
//! ```

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use peft_grammar::model::Precision;
use peft_passes::fuse::Thresholds;
use peft_passes::kernels::epilogue::Epilogue;
use peft_passes::kernels::gemm::{mma, simt, skinny};
use peft_passes::kernels::{Function, Schedule};
use peft_passes::lower::{Lowered, link};
use peft_passes::target::Machine;
use peft_passes::target::cuda::Chip;
use peft_runtime::artifact::{Element, Storage};
use peft_runtime::backend::BoundLaunch;
use peft_runtime::{Inputs, Numbers, Session};
use peftc::exchange;
use ptx_sim::{Gpu, Module, Ptr};

use crate::env_or_skip;
use crate::paper::{self, Spec, largest};
use crate::ptx::{self, InterpretedGpu, KernelLaunch, LaunchHook};

/// A launch of the half-precision step, which is recorded but not run there.
struct HalfLaunch {
    op: String,
    kernel: String,
    function: Function,
    extents: Vec<u64>,
    units: u64,
    buffers: Vec<BufferRole>,
}

/// The relation of a half-precision gemm's buffer to the buffers of the f32 gemm.
#[derive(PartialEq)]
enum BufferRole {
    /// The same buffer.
    Same,
    /// The packed frozen operand.
    Packed(Vec<u8>),
    /// The other operand, rounded.
    Rounded,
    /// An additional result in half precision, which a later gemm reads. The f32 gemm has no such buffer.
    HalfResult,
}

fn is_gemm(function: &Function) -> bool {
    matches!(function.schedule, Schedule::Mma(_))
}

/// The epilogue of a gemm kernel.
fn epilogue(function: &Function) -> &Epilogue {
    match &function.schedule {
        Schedule::Mma(product) => &product.epilogue,
        Schedule::Simt(product) => &product.epilogue,
        Schedule::Skinny(product) => &product.epilogue,
        other => panic!("{other:?} is no product"),
    }
}

/// The results that a kernel writes in half precision: the index of its buffer, the index of the result's buffer in the
/// f32 kernel `single`, and whether the result is written in half precision only.
fn half_results(kernel: &Function, single: &Function) -> Vec<(usize, usize, bool)> {
    let groups = epilogue(kernel).groups.iter().zip(&epilogue(single).groups);
    let made = groups.filter_map(|(own, single)| {
        let (_, at) = own.half?;
        Some((at, *single.buffers.last().expect("a result"), !own.stored))
    });
    made.collect()
}

/// The rows of A in bf16, as the half-precision gemm reads them, computed from the operand of the f32 launch.
fn rounded(half_launch: &HalfLaunch, single: &Function, start: &KernelLaunch, a: &[f32]) -> Vec<u8> {
    let mma::Sizes { m, depth, row_stride_a: row_stride, .. } =
        mma::Sizes::of(&half_launch.extents).map(|n| n as usize);
    let (along, first) = match &single.schedule {
        Schedule::Skinny(_) => {
            let skinny::Sizes { row_stride_a, offset_a, .. } = skinny::Sizes::of(&start.extents);
            (row_stride_a as usize, offset_a as usize)
        }
        _ => {
            let simt::Sizes { row_stride_a, offset_a, .. } = simt::Sizes::of(&start.extents);
            (row_stride_a as usize, offset_a as usize)
        }
    };
    let mut words = vec![0; m * row_stride * 4];
    for row in 0..m {
        for k in 0..depth {
            let x = half::bf16::from_f32(a[first + row * along + k]);
            words[row * row_stride * 4 + 2 * k..][..2].copy_from_slice(&x.to_le_bytes());
        }
    }
    words
}

/// The largest difference between a half-precision gemm and the f32 gemm, relative to the largest result.
type Gaps = HashMap<Function, f32>;

/// The steps of a spec in f32 and in half precision.
struct PrecisionPair {
    spec: Spec,
    single: Lowered,
    half: Lowered,
}

impl PrecisionPair {
    fn of(spec: Spec, machine: Machine) -> PrecisionPair {
        // The launches of both steps correspond one to one only without horizontal fusion.
        let thresholds = Thresholds { max_merged_launches: 1, ..paper::thresholds() };
        let [single, half] = [Precision::F32, Precision::Bf16].map(|p| spec.lowered(machine, p, thresholds));
        PrecisionPair { spec, single, half }
    }

    fn gemms(&self) -> HashSet<Function> {
        self.half.functions.iter().filter(|function| is_gemm(function)).cloned().collect()
    }

    /// Adds the gaps of gemms that are not in `known`.
    fn gaps(self, module: &Arc<Module>, known: &mut Gaps) {
        let model = self.spec.model();
        let inputs = exchange::inputs(&paper::batch(&model), [3, 5]);
        let weights = || paper::weights(&model);
        let half_launches = half_launches(module, self.half, weights(), &inputs);
        // Launches after the last new gemm need not run.
        let last = half_launches
            .iter()
            .rposition(|half_launch| is_gemm(&half_launch.function) && !known.contains_key(&half_launch.function));
        let Lowered { manifest, functions, .. } = self.single;
        let found = Arc::new(Mutex::new(std::mem::take(known)));
        let prepare = manifest.prepare.clone();
        let (mut half_launches, gaps) = (half_launches.into_iter().enumerate(), found.clone());
        let hook: LaunchHook = Box::new(move |gpu, job, start| {
            if prepare.contains(job.launch) {
                return start.run(gpu);
            }
            let (at, half_launch) = half_launches.next().expect("as many launches");
            assert_eq!(half_launch.op, job.launch.op);
            if Some(at) > last {
                return;
            }
            let mut gaps = gaps.lock().expect("one thread");
            if !is_gemm(&half_launch.function) || gaps.contains_key(&half_launch.function) {
                return start.run(gpu);
            }
            gaps.insert(half_launch.function.clone(), half_launch.gap(gpu, job, &functions[job.launch.kernel], start));
        });
        let backend = InterpretedGpu::new(module.clone(), &manifest).with(hook);
        paper::run(&mut Session::with_backend(Box::new(backend), manifest, weights()).expect("a session"), &inputs);
        *known = std::mem::take(&mut found.lock().expect("one thread"));
    }
}

/// Records the launches of a step without running them.
fn half_launches(module: &Arc<Module>, program: Lowered, weights: Vec<Numbers>, inputs: &Inputs) -> Vec<HalfLaunch> {
    let Lowered { manifest, functions, .. } = program;
    let found = Arc::new(Mutex::new(vec![]));
    let (half_launches, known) = (found.clone(), manifest.clone());
    let hook: LaunchHook = Box::new(move |gpu, job, start| {
        if known.prepare.contains(job.launch) {
            return start.run(gpu);
        }
        let function = functions[job.launch.kernel].clone();
        if let Schedule::Round(_) = function.schedule {
            return;
        }
        let places = job.launch.buffers.iter().zip(&start.buffers).zip(&job.ranges);
        let kinds = places.enumerate().map(|(i, ((&id, &ptr), place))| {
            let buffer = &known.buffers[id];
            match (&buffer.storage, buffer.element) {
                (Storage::Prepared, _) => BufferRole::Packed(gpu.read(ptr, 4 * place.length).to_vec()),
                (Storage::Temporary, Element::I32) if i == 0 => BufferRole::Rounded,
                (Storage::Temporary, Element::I32) => BufferRole::HalfResult,
                _ => BufferRole::Same,
            }
        });
        let buffers = if is_gemm(&function) { kinds.collect() } else { vec![] };
        let (op, kernel) = (job.launch.op.clone(), start.kernel.to_string());
        let half_launch =
            HalfLaunch { op, kernel, function, extents: start.extents.clone(), units: start.units, buffers };
        half_launches.lock().expect("one thread").push(half_launch);
    });
    let backend = InterpretedGpu::new(module.clone(), &manifest).with(hook);
    paper::run(&mut Session::with_backend(Box::new(backend), manifest, weights).expect("a session"), inputs);
    std::mem::take(&mut found.lock().expect("one thread"))
}

impl HalfLaunch {
    /// Runs the f32 launch, and this launch on copies of its operands. Returns the largest relative difference.
    fn gap(&self, gpu: &mut Gpu, job: &BoundLaunch, single: &Function, start: &KernelLaunch) -> f32 {
        // A buffer that is passed twice is copied once.
        let mut copies: HashMap<u64, Ptr> = HashMap::new();
        // For each buffer of this launch, the index of the corresponding buffer of the f32 launch.
        let mut of = vec![];
        let mut next = 0..start.buffers.len();
        let made = half_results(&self.function, single);
        let mut buffers: Vec<Ptr> = vec![];
        for kind in &self.buffers {
            if *kind == BufferRole::HalfResult {
                let &(_, result, _) = made.iter().find(|(at, ..)| *at == buffers.len()).expect("its epilogue says so");
                if result == next.start {
                    next.next();
                }
                buffers.push(gpu.alloc(vec![0; 2 * job.ranges[result].length]));
                of.push(result);
                continue;
            }
            let at = next.next().expect("as many buffers");
            of.push(at);
            buffers.push(match kind {
                BufferRole::Packed(content) => gpu.alloc(content.clone()),
                BufferRole::Rounded => {
                    let a = ptx::floats(gpu, start.buffers[at], job.ranges[at].length);
                    gpu.alloc(rounded(self, single, start, &a))
                }
                _ => *copies.entry(start.buffers[at].address()).or_insert_with(|| {
                    let content = gpu.read(start.buffers[at], 4 * job.ranges[at].length).to_vec();
                    gpu.alloc(content)
                }),
            });
        }
        assert_eq!(next.len(), 0, "buffers of {} and of {}", start.kernel, self.kernel);
        let (kernel, extents) = (&self.kernel[..], self.extents.clone());
        let half_launch =
            KernelLaunch { module: start.module, kernel, buffers, extents, units: self.units, group: start.group };
        half_launch.run(gpu);
        start.run(gpu);
        let mut worst = 0.0_f32;
        for (i, (kind, &at)) in self.buffers.iter().zip(&of).enumerate() {
            let length = job.ranges[at].length;
            let passed = made.iter().any(|&(_, result, passed)| passed && result == at);
            let found = match kind {
                BufferRole::Same if !passed => ptx::floats(gpu, half_launch.buffers[i], length),
                BufferRole::HalfResult => {
                    let halves = gpu.read(half_launch.buffers[i], 2 * length).chunks_exact(2);
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
        let copies: BTreeSet<u64> = half_launch.buffers.iter().map(|copy| copy.address()).collect();
        copies.into_iter().for_each(|copy| gpu.free(Ptr::at(copy)));
        worst
    }
}

fn every_gemm(chip: Chip, bound: f32) {
    let machine = Machine::Cuda(chip);
    let pairs: Vec<PrecisionPair> =
        paper::specs().iter().flat_map(Spec::small).map(|spec| PrecisionPair::of(spec, machine)).collect();
    let wanted: HashSet<Function> = pairs.iter().flat_map(PrecisionPair::gemms).collect();
    let mut chosen = paper::covering(pairs, PrecisionPair::gemms);
    let kernels = link(chosen.iter_mut().flat_map(|pair| [&mut pair.single, &mut pair.half]));
    let module = ptx::module(&kernels, machine);
    let mut gaps = Gaps::new();
    for pair in chosen {
        pair.gaps(&module, &mut gaps);
    }
    for (function, gap) in &gaps {
        println!("{gap:.1e} {}", function.name_stem());
    }
    let all = wanted.len() > 10 && gaps.len() == wanted.len() && gaps.keys().all(|ran| wanted.contains(ran));
    assert!(all, "{} of {} gemms ran", gaps.len(), wanted.len());
    let wrong: Vec<_> = gaps.iter().filter(|(_, gap)| !(0.0..=bound).contains(*gap)).collect();
    assert!(wrong.is_empty(), "beyond {bound:e}: {wrong:#?}");
    // Every gemm rounded its operands.
    assert!(gaps.values().all(|gap| *gap > 0.0));
}

#[test]
fn every_gemm_in_f16_is_close_to_f32() {
    every_gemm(Chip::Sm70, 1e-3);
}

/// bf16 has three mantissa bits fewer than f16.
#[test]
fn every_gemm_in_bf16_is_close_to_f32() {
    if env_or_skip("PEFTC_FULL").is_none() {
        return;
    }
    every_gemm(Chip::Sm80, 8e-3);
}
