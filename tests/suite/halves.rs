//! Every product of tensor cores that the paper's specs need, by itself: of a step in f32, which is held against the
//! processor's elsewhere, each product is done again in half precision on the same operands.
//!
//! ```text
//! a step in half precision: not run; its launches, and the packed weights they read
//! the step in f32: launch n    x, W  ─► y
//!                  and beside it  x, the other step's packed W  ─► y' ≈ y
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use peft_grammar::model::Precision;
use peft_passes::cuda::Chip;
use peft_passes::fuse::Limits;
use peft_passes::lower::Lowered;
use peft_passes::machine::Machine;
use peft_runtime::artifact::{Manifest, Storage};
use peft_runtime::backend::Job;
use peft_runtime::{Inputs, Numbers, Session};
use peftc::exchange;
use ptx_sim::{Gpu, Module, Ptr};

use crate::paper::{self, Spec, largest};
use crate::ptx::{self, Around, Simulated, Start};
use crate::{asked, parity};

/// A launch of the step that is not run.
struct Twin {
    op: String,
    kernel: String,
    extents: Vec<u64>,
    units: u64,
    /// By buffer, what was prepared for it.
    packed: Vec<Option<Vec<u8>>>,
}

fn is_product(kernel: &str) -> bool {
    kernel.starts_with("halves_")
}

/// How far a product is from f32's, as a part of the largest number of what it writes.
type Gaps = BTreeMap<String, f32>;

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

    fn products(&self) -> BTreeSet<String> {
        self.half.manifest.kernels.iter().filter(|kernel| is_product(kernel)).cloned().collect()
    }

    /// Of products that are not among `known` already.
    fn gaps(self, module: &Arc<Module>, known: &mut Gaps) {
        let model = self.spec.model();
        let inputs = exchange::inputs(&paper::batch(&model), [3, 5]);
        let weights = || paper::weights(&model);
        let twins = twins(module, self.half.manifest, weights(), &inputs);
        let (manifest, found) = (self.single.manifest, Arc::new(Mutex::new(std::mem::take(known))));
        let prepare = manifest.prepare.clone();
        let (mut twins, gaps) = (twins.into_iter(), found.clone());
        let around: Around = Box::new(move |gpu, job, start| {
            if prepare.contains(job.launch) {
                return start.run(gpu);
            }
            let twin = twins.next().expect("as many launches");
            assert_eq!(twin.op, job.launch.op);
            let mut gaps = gaps.lock().expect("one thread");
            if !is_product(&twin.kernel) || gaps.contains_key(&twin.kernel) {
                return start.run(gpu);
            }
            gaps.insert(twin.kernel.clone(), twin.gap(gpu, job, start));
        });
        let backend = Simulated::new(module.clone(), &manifest).with(around);
        paper::run(&mut Session::on(Box::new(backend), manifest, weights()).expect("a session"), &inputs);
        *known = std::mem::take(&mut found.lock().expect("one thread"));
    }
}

/// The launches of a step, which is not run.
fn twins(module: &Arc<Module>, manifest: Manifest, weights: Vec<Numbers>, inputs: &Inputs) -> Vec<Twin> {
    let found = Arc::new(Mutex::new(vec![]));
    let (twins, known) = (found.clone(), manifest.clone());
    let around: Around = Box::new(move |gpu, job, start| {
        if known.prepare.contains(job.launch) {
            return start.run(gpu);
        }
        let places = job.launch.buffers.iter().zip(&start.buffers).zip(&job.places);
        let packed = places.map(|((&id, &ptr), place)| {
            let prepared = known.buffers[id].storage == Storage::Prepared;
            prepared.then(|| gpu.read(ptr, 4 * place.length).to_vec())
        });
        let packed = if is_product(start.kernel) { packed.collect() } else { vec![] };
        let (op, kernel) = (job.launch.op.clone(), start.kernel.to_string());
        let twin = Twin { op, kernel, extents: start.extents.clone(), units: start.units, packed };
        twins.lock().expect("one thread").push(twin);
    });
    let backend = Simulated::new(module.clone(), &manifest).with(around);
    paper::run(&mut Session::on(Box::new(backend), manifest, weights).expect("a session"), inputs);
    std::mem::take(&mut found.lock().expect("one thread"))
}

impl Twin {
    /// Runs the launch, and this one on a copy of its operands.
    fn gap(&self, gpu: &mut Gpu, job: &Job, start: &Start) -> f32 {
        assert_eq!(self.packed.len(), start.buffers.len());
        // A buffer that is given twice is one.
        let mut copies: HashMap<u64, Ptr> = HashMap::new();
        let buffers: Vec<Ptr> = (0..self.packed.len())
            .map(|i| match &self.packed[i] {
                Some(content) => gpu.alloc(content.clone()),
                None => *copies.entry(start.buffers[i].address()).or_insert_with(|| {
                    let content = gpu.read(start.buffers[i], 4 * job.places[i].length).to_vec();
                    gpu.alloc(content)
                }),
            })
            .collect();
        let (kernel, extents) = (&self.kernel[..], self.extents.clone());
        let twin = Start { module: start.module, kernel, buffers, extents, units: self.units };
        twin.run(gpu);
        start.run(gpu);
        let mut worst = 0.0_f32;
        for (i, place) in job.places.iter().enumerate().filter(|(i, _)| self.packed[*i].is_none()) {
            let [want, found] = [start, &twin].map(|start| ptx::floats(gpu, start.buffers[i], place.length));
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
    let mut chosen = vec![];
    let mut wanted = BTreeSet::new();
    for spec in paper::specs().iter().flat_map(Spec::small) {
        let pair = Pair::of(spec, machine);
        let products = pair.products();
        if !products.is_subset(&wanted) {
            wanted.extend(products);
            chosen.push(pair);
        }
    }
    let kernels = parity::kernels(chosen.iter().flat_map(|pair| [&pair.single, &pair.half]));
    let module = ptx::module(&kernels, machine);
    let mut gaps = Gaps::new();
    for pair in chosen {
        pair.gaps(&module, &mut gaps);
    }
    for (kernel, gap) in &gaps {
        println!("{gap:.1e} {kernel}");
    }
    assert!(wanted.len() > 10 && gaps.keys().eq(&wanted), "{} of {} products ran", gaps.len(), wanted.len());
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
