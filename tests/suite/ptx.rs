//! Whole training steps in PTX, launch by launch in the interpreter of PTX: no GPU is needed, and every access is
//! checked.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use peft_grammar::model::{Model, Precision};
use peft_passes::codegen;
use peft_passes::cuda::{Chip, WARP, WARPS};
use peft_passes::dialect::Dialect;
use peft_passes::machine::Machine;
use peft_passes::pipeline::Options;
use peft_runtime::artifact::{Buffer, Launch, Manifest, Sizes, Storage};
use peft_runtime::{Inputs, RuntimeError};
use peftc::exchange::{self, Engine};
use ptx_sim::{Arg, Gpu, Module, Ptr};

use crate::fixtures::{self, Fixture};
use crate::parity;

/// Blocks of a launch, at most.
const BLOCKS: u64 = 4;

/// A program in the interpreter, with its memory: each buffer apart, so that nothing reads or writes beyond it unseen.
struct Simulated {
    manifest: Manifest,
    module: Module,
    gpu: Gpu,
    tensors: Vec<Ptr>,
    /// Where each tensor's trainable values begin in the flat vectors.
    places: Vec<usize>,
    flats: BTreeMap<String, Ptr>,
    values: u64,
    prepared: HashMap<usize, Ptr>,
    /// The last run, and where its temporaries lie.
    last: Option<(String, Sizes, HashMap<usize, Ptr>)>,
}

impl Simulated {
    fn new(fixture: &Fixture, model: &Model, chip: Chip, fused: bool) -> Self {
        let machine = Machine::Cuda(chip);
        let lowered = parity::lowered(fixture, model, &Options { machine, ..parity::fused(fused) });
        let dialect = Dialect::new().expect("a dialect");
        let text = codegen::ptx(&dialect, &lowered.kernels, machine).unwrap_or_else(|e| panic!("{e}"));
        let module = Module::parse(&text).unwrap_or_else(|e| panic!("{e}"));
        let weights = exchange::weights(&fixture.file, model, &fixture.path).expect("weights");
        let manifest = lowered.manifest;
        let mut gpu = Gpu::new();
        let (mut values, mut decay, mut places) = (vec![], vec![], vec![]);
        for (tensor, data) in manifest.tensors.iter().zip(&weights) {
            places.push(values.len());
            let (from, length) = (tensor.trainable.map_or(0, |(start, _)| start), tensor.trainable_elements() as usize);
            values.extend_from_slice(&data[(from * tensor.row()) as usize..][..length]);
            decay.extend(vec![f32::from(u8::from(tensor.decay)); length]);
        }
        let count = values.len();
        let zeros = vec![0.0; count];
        let flats = [("values", &values), ("decay", &decay), ("m", &zeros), ("v", &zeros)];
        let mut flats: BTreeMap<String, Ptr> =
            flats.into_iter().map(|(name, x)| (name.to_string(), gpu.alloc_f32(x))).collect();
        flats.insert("gradients".into(), gpu.alloc_unwritten(4 * count));
        let tensors = weights.iter().map(|w| gpu.alloc_f32(w)).collect();
        let (values, prepared) = (count as u64, HashMap::new());
        let mut simulated = Simulated { manifest, module, gpu, tensors, places, flats, values, prepared, last: None };
        let launches = std::mem::take(&mut simulated.manifest.prepare);
        let sizes = Sizes { values, ..Sizes::default() };
        simulated.launches(&launches, &sizes, &Inputs::default());
        simulated
    }

    /// All of them in their order; gives the temporaries.
    fn launches(&mut self, launches: &[Launch], sizes: &Sizes, inputs: &Inputs) -> HashMap<usize, Ptr> {
        let ids: BTreeSet<usize> = launches.iter().flat_map(|l| l.buffers.iter().copied()).collect();
        let buffers: Vec<(usize, Buffer)> = ids.into_iter().map(|id| (id, self.manifest.buffers[id].clone())).collect();
        let place = |(id, buffer): (usize, Buffer)| (id, self.locate(id, &buffer, sizes, inputs));
        let mut bound: HashMap<usize, Ptr> = buffers.into_iter().map(place).collect();
        for launch in launches {
            let units = launch.units.eval(sizes);
            if units > 0 {
                let pointers = launch.buffers.iter().map(|id| Arg::Ptr(bound[id]));
                let extents = launch.extents.iter().map(|e| Arg::U64(e.eval(sizes)));
                let args: Vec<Arg> = pointers.chain(extents).chain([Arg::U64(units)]).collect();
                let (kernel, blocks) = (&self.manifest.kernels[launch.kernel], units.min(BLOCKS) as u32);
                let ran = self.gpu.launch(&self.module, kernel, blocks, (WARP * WARPS) as u32, 0, &args);
                ran.unwrap_or_else(|e| panic!("{}: {e}", launch.op));
            }
        }
        bound.retain(|id, _| self.manifest.buffers[*id].storage == Storage::Temporary);
        bound
    }

    fn locate(&mut self, id: usize, buffer: &Buffer, sizes: &Sizes, inputs: &Inputs) -> Ptr {
        let bytes = 4 * buffer.elements(sizes) as usize;
        let after = |ptr: Ptr, numbers: u64| ptr.offset(4 * numbers);
        match &buffer.storage {
            Storage::Input(name) => {
                if let Some(x) = inputs.floats.get(name) {
                    return self.gpu.alloc_f32(x);
                }
                let derived = inputs.derived();
                let ints = derived.get(&name[..]).or_else(|| inputs.ints.get(name));
                self.gpu.alloc_i32(ints.unwrap_or_else(|| panic!("`{name}` is missing")))
            }
            Storage::Tensor { index, rows } => {
                let tensor = &self.manifest.tensors[*index];
                let start = rows.map_or(0, |(start, _)| start);
                match tensor.trainable {
                    Some((first, _)) if tensor.trains(*rows) => {
                        after(self.flats["values"], self.places[*index] as u64 + (start - first) * tensor.row())
                    }
                    _ => after(self.tensors[*index], start * tensor.row()),
                }
            }
            Storage::Gradient { index } => after(self.flats["gradients"], self.places[*index] as u64),
            Storage::Flat(name) => self.flats[name],
            Storage::Prepared => *self.prepared.entry(id).or_insert_with(|| self.gpu.alloc_unwritten(bytes)),
            Storage::Temporary => self.gpu.alloc_unwritten(bytes),
        }
    }
}

impl Engine for Simulated {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn run(&mut self, entry: &str, inputs: &Inputs) -> Result<(), RuntimeError> {
        let sizes = inputs.sizes(self.values as usize)?;
        let launches = self.manifest.entries[entry].launches.clone();
        let temporaries = self.launches(&launches, &sizes, inputs);
        if let Some((.., before)) = self.last.replace((entry.into(), sizes, temporaries)) {
            before.into_values().for_each(|ptr| self.gpu.free(ptr));
        }
        Ok(())
    }

    fn outputs(&self) -> Vec<String> {
        let entry = self.last.as_ref().map(|(entry, ..)| &self.manifest.entries[entry]);
        entry.map_or(vec![], |e| e.outputs.iter().map(|o| o.name.clone()).collect())
    }

    fn output(&self, name: &str) -> Option<(Vec<u64>, Cow<'_, [f32]>)> {
        let (entry, sizes, temporaries) = self.last.as_ref()?;
        let output = self.manifest.entries[entry].outputs.iter().find(|o| o.name == name)?;
        let shape: Vec<u64> = output.shape.iter().map(|e| e.eval(sizes)).collect();
        let data = match self.manifest.buffers[output.buffer].storage {
            Storage::Temporary => self.gpu.read_f32(temporaries[&output.buffer]),
            Storage::Gradient { index } => self.gpu.read_f32(self.flats["gradients"]).split_off(self.places[index]),
            Storage::Prepared => self.gpu.read_f32(self.prepared[&output.buffer]),
            _ => return None,
        };
        let length = shape.iter().product::<u64>() as usize;
        Some((shape, data.get(..length)?.to_vec().into()))
    }
}

fn steps(prefix: &str, chip: Chip, fused: bool) {
    parity::check(prefix, Precision::F32, |fixture, model, padded| {
        let mut simulated = Simulated::new(fixture, model, chip, fused);
        exchange::run(&mut simulated, model, "grad", padded, [0, 0]).expect("a run")
    });
}

#[test]
fn gpt2_in_ptx() {
    steps("gpt2_inducer_lora_strong", Chip::Sm70, true);
}

#[test]
fn bert_in_ptx() {
    steps("bert_mam_inducer", Chip::Sm70, true);
}

#[test]
fn llama_in_ptx() {
    steps("llama_lora_qv", Chip::Sm90, true);
}

#[test]
fn every_fixture_in_ptx() {
    if std::env::var_os("PEFTC_FULL").is_none() {
        println!("skipped: PEFTC_FULL is not set");
        return;
    }
    for backbone in ["gpt2_", "bert_", "roberta_", "llama_"] {
        steps(backbone, Chip::Sm70, true);
    }
    steps("gpt2_inducer_lora_strong", Chip::Sm90, false);
}

/// The optimizer's steps, with clipping and weight decay, beside the processor's.
#[test]
fn updates_in_ptx() {
    let fixture = fixtures::all("gpt2_lora_qv").remove(0);
    let model = fixture.model();
    let padded = exchange::batch(&fixture.file, "inputs.", &fixture.path).expect("a batch");
    let mut session = parity::session(&fixture, &model, &parity::fused(true));
    let mut simulated = Simulated::new(&fixture, &model, Chip::Sm80, true);
    for step in 1..3 {
        let (beta1, beta2) = (0.9_f32, 0.999_f32);
        let biases = [1.0 - beta1, 1.0 - beta2, 1.0 - beta1.powi(step), 1.0 - beta2.powi(step)];
        let hyper = [&[1e-2, beta1, beta2, 1e-8, 0.1, 0.1], &biases[..]].concat();
        let batch = padded.inputs([3, step]);
        let hyper = Inputs { floats: [("hyper".to_string(), hyper)].into(), ..Inputs::default() };
        for (entry, inputs) in [("train", &batch), ("update", &hyper)] {
            session.run(entry, inputs).expect("a run");
            Engine::run(&mut simulated, entry, inputs).expect("a run");
        }
        let found = simulated.gpu.read_f32(simulated.flats["values"]);
        let close = |(x, y): (&f32, &f32)| (x - y).abs() <= 1e-5 * y.abs().max(1e-2);
        assert!(found.iter().zip(session.flat("values")).all(close), "step {step}");
        let norms = [session.output("grad_norm").map(|(_, x)| x[0]), simulated.output("grad_norm").map(|(_, x)| x[0])];
        assert!(norms[0].zip(norms[1]).is_some_and(|(x, y)| x > 0.1 && (x - y).abs() < 1e-5 * x), "{norms:?}");
    }
}
