//! Whole training steps in PTX, run launch by launch in the PTX interpreter. No GPU is needed, and every memory access
//! is checked.

use std::borrow::Cow;
use std::sync::Arc;

use peft_grammar::model::{Model, Precision, Recipe};
use peft_grammar::names::{Entry, GRAD_NORM, Input, OptimizerEntry, Output, Vector};
use peft_passes::codegen;
use peft_passes::dialect::Dialect;
use peft_passes::pipeline::Options;
use peft_passes::target::Machine;
use peft_passes::target::cuda::Chip;
use peft_runtime::adapter::{Data, Stored};
use peft_runtime::artifact::{Manifest, Workgroup};
use peft_runtime::backend::{Allocation, Backend, BoundLaunch, MemoryRange, Words};
use peft_runtime::{Inputs, Profile, RuntimeError, Session};
use peftc::exchange;
use ptx_sim::{Arg, Gpu, Module, Ptr};

use crate::fixtures::{self, Fixture};
use crate::{env_or_skip, parity};

/// The largest number of thread blocks of a launch.
const MAX_BLOCKS: u64 = 4;

/// A backend that interprets PTX.
pub struct InterpretedGpu {
    module: Arc<Module>,
    kernels: Vec<String>,
    gpu: Gpu,
    allocations: Vec<Option<Ptr>>,
    hook: Option<LaunchHook>,
}

/// A hook that replaces each launch and has to run it itself.
pub type LaunchHook = Box<dyn FnMut(&mut Gpu, &BoundLaunch, &KernelLaunch) + Send>;

/// A kernel launch with its arguments.
pub struct KernelLaunch<'a> {
    pub module: &'a Module,
    pub kernel: &'a str,
    pub buffers: Vec<Ptr>,
    pub extents: Vec<u64>,
    pub units: u64,
    pub group: Workgroup,
}

impl KernelLaunch<'_> {
    pub fn run(&self, gpu: &mut Gpu) {
        let pointers = self.buffers.iter().map(|&ptr| Arg::Ptr(ptr));
        let number = |n: u64| Arg::U32(n.try_into().expect("32 bits"));
        let extents = self.extents.iter().map(|&n| number(n));
        let args: Vec<Arg> = pointers.chain(extents).chain([number(self.units)]).collect();
        let blocks = self.units.div_ceil(self.group.units).min(MAX_BLOCKS) as u32;
        let ran = gpu.launch(self.module, self.kernel, blocks, self.group.threads as u32, 0, &args);
        ran.unwrap_or_else(|e| panic!("{e}"));
    }
}

impl InterpretedGpu {
    pub fn new(module: Arc<Module>, manifest: &Manifest) -> Self {
        InterpretedGpu { module, kernels: manifest.kernels.clone(), gpu: Gpu::new(), allocations: vec![], hook: None }
    }

    pub fn with(self, hook: LaunchHook) -> Self {
        InterpretedGpu { hook: Some(hook), ..self }
    }

    fn address(&self, place: &MemoryRange) -> Ptr {
        self.allocations[place.allocation.0].expect("a block in use").offset(4 * place.start as u64)
    }
}

impl Backend for InterpretedGpu {
    fn alloc(&mut self, length: usize) -> Result<Allocation, RuntimeError> {
        self.allocations.push(Some(self.gpu.alloc(vec![0; 4 * length])));
        Ok(Allocation(self.allocations.len() - 1))
    }

    fn free(&mut self, allocation: Allocation) {
        self.gpu.free(self.allocations[allocation.0].take().expect("a block in use"));
    }

    fn write(&mut self, allocation: Allocation, start: usize, words: Words) -> Result<(), RuntimeError> {
        let to = self.address(&MemoryRange { allocation, start, length: words.len() });
        match words {
            Words::Floats(x) => self.gpu.write_f32(to, x),
            Words::Ints(x) => self.gpu.write_i32(to, x),
        }
        Ok(())
    }

    fn read(&self, place: MemoryRange) -> Result<Cow<'_, [f32]>, RuntimeError> {
        Ok(floats(&self.gpu, self.address(&place), place.length).into())
    }

    fn run(&mut self, jobs: &[BoundLaunch], _: Option<&mut Profile>) -> Result<(), RuntimeError> {
        for job in jobs {
            for place in &job.poisoned {
                self.gpu.erase(self.address(place), 4 * place.length);
            }
            let start = KernelLaunch {
                module: &self.module,
                kernel: &self.kernels[job.launch.kernel],
                buffers: job.ranges.iter().map(|place| self.address(place)).collect(),
                extents: job.extents.clone(),
                units: job.units,
                group: job.launch.group,
            };
            match &mut self.hook {
                Some(hook) => hook(&mut self.gpu, job, &start),
                None => start.run(&mut self.gpu),
            }
        }
        Ok(())
    }

    fn allocated_bytes(&self) -> u64 {
        0
    }
}

/// Reads `length` numbers from an address.
pub fn floats(gpu: &Gpu, from: Ptr, length: usize) -> Vec<f32> {
    let bytes = gpu.read(from, 4 * length).chunks_exact(4);
    bytes.map(|x| f32::from_le_bytes(x.try_into().expect("four"))).collect()
}

/// Parses kernels for the PTX interpreter.
pub fn module(kernels: &[String], machine: Machine) -> Arc<Module> {
    let text = codegen::ptx(&Dialect::new().expect("a dialect"), kernels, machine).unwrap_or_else(|e| panic!("{e}"));
    Arc::new(Module::parse(&text).unwrap_or_else(|e| panic!("{e}")))
}

fn session(fixture: &Fixture, model: &Model, chip: Chip, fused: bool) -> Session {
    let machine = Machine::Cuda(chip);
    let lowered = parity::lowered(fixture, model, &Options { machine, ..parity::fused(fused) });
    let simulated = InterpretedGpu::new(module(&lowered.kernels(), machine), &lowered.manifest);
    let weights = exchange::weights(&fixture.file, model, &fixture.path).expect("weights");
    let mut session = Session::with_backend(Box::new(simulated), lowered.manifest, weights).expect("a session");
    session.poison = true;
    session
}

fn steps(prefix: &str, chip: Chip, fused: bool, precision: Precision) {
    parity::check(&parity::models(prefix, precision), |fixture, model, padded| {
        exchange::run(&mut session(fixture, model, chip, fused), model, Entry::Grad, padded, [0, 0]).expect("a run")
    });
}

#[test]
fn gpt2_step_in_ptx_matches_pytorch() {
    steps("gpt2_inducer_lora_strong", Chip::Sm70, true, Precision::F32);
}

/// A regression, with one number per sequence from the last token.
#[test]
fn regression_head_in_ptx_matches_pytorch() {
    steps("head_gpt2_regression", Chip::Sm70, true, Precision::F32);
}

/// Tensor-core gemms in f16 and in bf16.
#[test]
fn half_precision_in_ptx_is_close_to_pytorch() {
    steps("gpt2_lora_qv", Chip::Sm70, true, Precision::Bf16);
    steps("bert_lora_qv", Chip::Sm80, true, Precision::Bf16);
}

/// f16 covers 6·10⁻⁵ to 65504, while adjoints can have any magnitude, so gemms scale adjoints by powers of two. No loss
/// scaling is needed, no step is skipped, and gradients are as close to f32's as f16's 11 bits allow.
#[test]
fn f16_adjoints_of_any_magnitude_stay_accurate() {
    let fixture = fixtures::one("gpt2_lora_qv");
    let padded = exchange::batch(&fixture.file, "inputs.", &fixture.path, &fixture.model()).expect("a batch");
    let gpt2 = peft_grammar::library::backbones().into_iter().find(|b| b.name == "gpt2").expect("a backbone");
    let logits = "logits = y[targets] @ transpose(unembedding)";
    assert!(gpt2.source.contains(logits));
    for by in ["1e-9", "1", "1e6"] {
        // The value of y is unchanged, but its adjoint is scaled, and so are all adjoints behind it.
        let scaled = format!("y = detach(y) + {by} * (y - detach(y))\n{logits}");
        let backbone = gpt2.source.replace(logits, &scaled).replace("backbone gpt2(", "backbone scaled(");
        let spec = format!("{backbone}\n{}", fixture.spec().replace("gpt2(", "scaled("));
        let checked = peft_grammar::check("spec.peft", &spec, &peft_grammar::no_imports);
        let mut model = checked.unwrap_or_else(|e| panic!("{e}"));
        let mut processor = parity::session(&fixture, &model, &parity::fused(true));
        let want = exchange::run(&mut processor, &model, Entry::Grad, &padded, [0, 0]).expect("a run");
        model.train.precision = Precision::Bf16;
        let mut gpu = session(&fixture, &model, Chip::Sm70, true);
        let mut gaps = vec![];
        let found = exchange::run(&mut gpu, &model, Entry::Grad, &padded, [0, 0]).expect("a run");
        for (name, want) in want.tensors.iter().filter(|(name, _)| Output::from_name(name).gradient().is_some()) {
            let floats = |stored: &Stored| match &stored.data {
                Data::F32(x) => x.clone(),
                _ => panic!("`{name}` in f32"),
            };
            let (want, found) = (floats(want), floats(&found.tensors[name]));
            let largest = want.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let gap = want.iter().zip(&found).fold(0.0_f32, |m, (x, y)| m.max((x - y).abs()));
            // About a dozen gemms contribute. For the worst tensor, rounding the weights alone gives 1.5e-3, and
            // rounding the other operands 1.4e-3.
            assert!(largest > 0.0 && gap <= 3e-3 * largest, "{by}, `{name}`: {gap:e} of {largest:e}");
            gaps.push(gap / largest);
        }
        let mean = gaps.iter().sum::<f32>() / gaps.len() as f32;
        // A mean above 1e-5 shows that operands were rounded.
        assert!(gaps.len() >= 8 && (1e-5..2e-3).contains(&mean), "{by}: {gaps:?}");
    }
}

#[test]
fn bert_step_in_ptx_matches_pytorch() {
    steps("bert_mam_inducer", Chip::Sm70, true, Precision::F32);
}

#[test]
fn llama_step_in_ptx_matches_pytorch() {
    steps("llama_lora_qv", Chip::Sm90, true, Precision::F32);
}

#[test]
fn every_fixture_in_ptx_matches_pytorch() {
    if env_or_skip("PEFTC_FULL").is_none() {
        return;
    }
    for backbone in ["gpt2_", "bert_", "roberta_", "llama_"] {
        steps(backbone, Chip::Sm70, true, Precision::F32);
        steps(backbone, Chip::Sm70, true, Precision::Bf16);
        steps(backbone, Chip::Sm80, true, Precision::Bf16);
    }
    steps("gpt2_inducer_lora_strong", Chip::Sm90, false, Precision::F32);
}

/// The optimizer's steps with clipping and weight decay, against the CPU.
#[test]
fn optimizer_updates_in_ptx_match_the_cpu() {
    let fixture = fixtures::all("gpt2_lora_qv").remove(0);
    let model = fixture.model();
    let padded = exchange::batch(&fixture.file, "inputs.", &fixture.path, &model).expect("a batch");
    let mut sessions =
        [parity::session(&fixture, &model, &parity::fused(true)), session(&fixture, &model, Chip::Sm80, true)];
    let recipe = Recipe { weight_decay: 0.1, clip: 0.1, ..model.train.clone() };
    for step in 1..3 {
        let hyper = recipe.hyper(1e-2, step as u64 - 1);
        let batch = padded.inputs([3, step]);
        let hyper = Inputs { floats: [(Input::Hyper.name().to_string(), hyper)].into(), ..Inputs::default() };
        for session in &mut sessions {
            session.run(Entry::Train.name(), &batch).expect("a run");
            session.run(OptimizerEntry::Update.name(), &hyper).expect("a run");
        }
        let [want, found] = [0, 1].map(|i| sessions[i].flat(Vector::Values).expect("read"));
        // The rounding of a near-zero gradient is relatively large, and Adam scales it to the size of the learning
        // rate.
        let apart = |(x, y): (&f32, &f32)| (x - y).abs() > 1e-5 * y.abs().max(1e-2);
        let apart: Vec<(&f32, &f32)> = found.iter().zip(want.iter()).filter(|&(x, y)| apart((x, y))).collect();
        assert!(apart.len() <= found.len() / 1000, "step {step}: {} of {}, {apart:?}", apart.len(), found.len());
        assert!(apart.iter().all(|(x, y)| (*x - *y).abs() < 1e-4), "step {step}: {apart:?}");
        let [want, found] = [0, 1].map(|i| sessions[i].output(GRAD_NORM).expect("an output").1[0]);
        assert!(want > 0.1 && (want - found).abs() < 1e-5 * want, "{found}, not {want}");
    }
}
