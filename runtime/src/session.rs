//! A session runs an artifact's entries: it assigns device memory to every buffer and passes the launches to a backend.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use peft_grammar::names::{Entry, Input, Vector};

use crate::arena::{self, Plan};
use crate::artifact::{Buffer, BufferId, Element, Launch, Limit, Manifest, Output, Sizes, Storage};
use crate::backend::{Backend, BoundLaunch, MemoryRange, PendingRead, Profile, Words};
use crate::cpu::{Cpu, Library};
use crate::cuda::Cuda;
use crate::error::{BatchPosition, OutOfRange, RuntimeError};
use crate::memory::{CACHE_LINE_FLOATS, Numbers, trim_heap};
use crate::trust::{TrustError, TrustSubject, trusted};
use crate::validate::validate;

/// A loaded artifact: its manifest and the kernels that the manifest names.
pub struct Program {
    /// Entries, buffers and tensors, already validated.
    pub manifest: Manifest,
    code: Code,
}

enum Code {
    Library(Library),
    Ptx(String),
}

impl Program {
    /// Loads the shared library or the PTX text at `path`, with the kernels that `manifest` names.
    ///
    /// # Errors
    ///
    /// If the manifest is inconsistent, if a user other than the caller or root could have written the file
    /// ([`crate::trust`]), or if the file cannot be read or lacks a kernel.
    pub fn new(manifest: Manifest, path: &Path) -> Result<Self, RuntimeError> {
        validate(&manifest).map_err(|why| RuntimeError::artifact(path, why))?;
        let path = &trusted(path, TrustSubject::Artifact).map_err(|error| match error {
            TrustError::Untrusted(untrusted) => RuntimeError::Untrusted(untrusted),
            TrustError::Unreadable(error) => RuntimeError::artifact(path, error),
        })?;
        let code = match manifest.gpu() {
            Some(_) => Code::Ptx(std::fs::read_to_string(path).map_err(|e| RuntimeError::artifact(path, e))?),
            None => Code::Library(Library::load(path, &manifest.kernels)?),
        };
        Ok(Program { manifest, code })
    }

    /// Drops every other entry, and the preparation launches that only those entries need, so that no weight is packed
    /// in vain.
    pub fn retain_entries(mut self, entries: &[&str]) -> Self {
        let Manifest { entries: known, prepare, buffers, .. } = &mut self.manifest;
        known.retain(|name, _| entries.contains(&name.as_str()));
        let runs = known.values().flat_map(|e| &e.launches).flat_map(|l| &l.buffers);
        let outputs = known.values().flat_map(|e| &e.outputs).map(|o| &o.buffer);
        let mut read: BTreeSet<BufferId> = runs.chain(outputs).copied().collect();
        // A preparation launch may read what an earlier one wrote, so the launches are visited from the last to the
        // first.
        let mut kept: Vec<Launch> = vec![];
        for launch in prepare.drain(..).rev() {
            let makes: Vec<BufferId> =
                launch.buffers.iter().copied().filter(|&b| buffers[b].storage == Storage::Prepared).collect();
            if makes.iter().any(|b| read.contains(b)) {
                read.extend(makes);
                kept.push(launch);
            }
        }
        kept.reverse();
        *prepare = kept;
        self
    }
}

/// The inputs of one run: a packed batch of sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs {
    /// The number of tokens of each sequence.
    pub lengths: Vec<i32>,
    /// Integer inputs by name: `ids`, `labels`, `rng`, …
    pub ints: BTreeMap<String, Vec<i32>>,
    /// Floating-point inputs by name: `hyper`, `shares`.
    pub floats: BTreeMap<String, Vec<f32>>,
}

impl Inputs {
    /// The extents of this batch; `values` is the number of trainable values of the session.
    ///
    /// # Errors
    ///
    /// If a sequence has no tokens, or if Σ length² does not fit an `i32`.
    pub fn sizes(&self, values: usize) -> Result<Sizes, RuntimeError> {
        if let Some(length) = self.lengths.iter().find(|&&n| n <= 0) {
            return Err(RuntimeError::input("lengths", format!("a sequence of {length} tokens")));
        }
        let lengths = self.lengths.iter().map(|&n| n as u64);
        let pairs = lengths.clone().map(|n| n * n).fold(0, u64::saturating_add);
        // Kernels index query-key pairs with an i32. There are at least as many pairs as tokens, so this bounds the
        // tokens too.
        if pairs > i32::MAX as u64 {
            return Err(RuntimeError::input("lengths", "their squares add up to 2³¹ or more; make the batch smaller"));
        }
        Ok(Sizes {
            tokens: lengths.sum(),
            sequences: self.lengths.len() as u64,
            targets: self.ints.get(Input::Targets.name()).map_or(0, |t| t.len() as u64),
            pairs,
            values: values as u64,
        })
    }

    /// Checks every integer input that kernels use as an index against the manifest's limits.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::OutOfRange`] with the first value that lies outside its range.
    pub fn check(&self, limits: &[Limit], sizes: &Sizes) -> Result<(), RuntimeError> {
        for limit in limits {
            let Some(values) = self.ints.get(&limit.input) else { continue };
            let below = limit.below.eval(sizes);
            let most = below.min(1 << 31) as u32;
            let except = limit.except.and_then(|x| u32::try_from(x).ok()).unwrap_or(u32::MAX);
            // A negative number becomes a large unsigned one, so one comparison checks both ends of the range.
            let fits = |x: i32| (x as u32) < most && x as u32 != except;
            // The first pass has no early exit and therefore vectorises; the second, which finds the value, runs only
            // on failure.
            if values.iter().fold(true, |fit, &x| fit & fits(x)) {
                continue;
            }
            let at = values.iter().position(|&x| !fits(x)).unwrap_or_default();
            let position = self.position(&limit.input, at);
            return Err(OutOfRange { index: at, value: values[at], position, below, limit: limit.clone() }.into());
        }
        Ok(())
    }

    /// The token or sequence of the batch that value `at` of an input belongs to.
    fn position(&self, input: &str, at: usize) -> BatchPosition {
        let target = |at: usize| self.ints.get(Input::Targets.name()).and_then(|t| t.get(at)).map(|&t| t as usize);
        let token = match Input::from_name(input) {
            Some(Input::Ids | Input::Types | Input::Positions) => Some(at),
            Some(Input::Targets | Input::Labels) => target(at),
            _ => None,
        };
        let Some(token) = token else { return BatchPosition { sequence: at, token: None } };
        let mut start = 0;
        for (sequence, &length) in self.lengths.iter().enumerate() {
            let end = start + length as usize;
            if token < end {
                return BatchPosition { sequence, token: Some(token - start) };
            }
            start = end;
        }
        BatchPosition { sequence: self.lengths.len(), token: None }
    }

    /// The integer inputs that follow from the lengths: `offsets`, `segments` and `pairs` (see [`Storage::Input`]).
    pub fn derived(&self) -> BTreeMap<&'static str, Vec<i32>> {
        let (mut offsets, mut segments, mut pairs) = (vec![0], vec![], vec![0]);
        let (mut tokens, mut pair_count) = (0, 0);
        for (s, &n) in self.lengths.iter().enumerate() {
            tokens += n;
            offsets.push(tokens);
            for _ in 0..n {
                segments.push(s as i32);
                pair_count += n;
                pairs.push(pair_count);
            }
        }
        let derived = [(Input::Offsets, offsets), (Input::Segments, segments), (Input::Pairs, pairs)];
        derived.map(|(input, x)| (input.name(), x)).into()
    }
}

/// A program with its weights in device memory, ready to run.
pub struct Session {
    manifest: Manifest,
    backend: Box<dyn Backend>,
    memory: DeviceMemory,
    /// Fills each temporary with NaN before its first use, so that a kernel that reads an element nobody wrote shows.
    pub poison: bool,
    /// If present, launches are waited for one by one and their times are added here.
    pub profile: Option<Profile>,
    /// Memory plans by the entries that run together, each with the largest sizes it serves.
    plans: BTreeMap<Vec<String>, (Sizes, Arc<Plan>)>,
    staged: Option<Staged>,
    last: Option<Run>,
    peak: u64,
}

/// The next run: entries that execute in order, on a batch whose upload has been started.
struct Staged {
    entries: Vec<String>,
    sizes: Sizes,
}

/// A pending read that [`Session::begin_read`] started.
#[derive(Debug)]
pub struct PendingOutputs(PendingRead);

/// The last run and the memory plan of its temporaries.
struct Run {
    entries: Vec<String>,
    sizes: Sizes,
    plan: Arc<Plan>,
}

/// Where each buffer of the manifest is in the backend's memory.
struct DeviceMemory {
    /// Frozen tensors that a launch still reads. A tensor of which only some rows train is kept here whole.
    tensors: Vec<Option<MemoryRange>>,
    /// Offset of each tensor's trainable values in the flat vectors.
    value_offsets: Vec<usize>,
    flats: BTreeMap<Vector, MemoryRange>,
    prepared: HashMap<BufferId, MemoryRange>,
    arena: MemoryRange,
    /// Double-buffered batches: one that the last run reads, and one that is uploaded meanwhile.
    batches: [BatchInputs; 2],
    /// Index of the batch that the last run reads.
    current: usize,
}

/// A batch in one allocation, with the offset and the length of each input in it.
struct BatchInputs {
    range: MemoryRange,
    slices: BTreeMap<String, (usize, usize)>,
}

impl Session {
    /// Uploads and packs the weights, on the backend that the program was compiled for.
    ///
    /// `weights` holds every tensor of the manifest, in the manifest's order. `threads` is the number of CPU threads, 0
    /// for one per core.
    ///
    /// # Errors
    ///
    /// If a weight has the wrong size, if there is not enough memory, or if the GPU refuses the kernels.
    pub fn new(program: Program, weights: Vec<Numbers>, threads: usize) -> Result<Self, RuntimeError> {
        let Program { manifest, code } = program;
        let backend: Box<dyn Backend> = match code {
            Code::Library(library) => Box::new(Cpu::new(library, threads)?),
            Code::Ptx(text) => Box::new(Cuda::new(&text, &manifest.kernels)?),
        };
        Session::with_backend(backend, manifest, weights)
    }

    /// Uploads and packs the weights on any backend that has the manifest's kernels.
    ///
    /// # Errors
    ///
    /// As [`Session::new`].
    pub fn with_backend(
        mut backend: Box<dyn Backend>,
        manifest: Manifest,
        weights: Vec<Numbers>,
    ) -> Result<Self, RuntimeError> {
        // The compiler may have run in this process; the memory that it freed goes back to the operating system.
        trim_heap();
        let tensors = &manifest.tensors;
        if weights.len() != tensors.len() {
            let message = format!("{} tensors where the artifact has {}", weights.len(), tensors.len());
            return Err(RuntimeError::input("weights", message));
        }
        for (tensor, data) in tensors.iter().zip(&weights) {
            if tensor.shape.iter().product::<u64>() != data.len() as u64 {
                return Err(RuntimeError::input(&tensor.name, format!("{} values for {:?}", data.len(), tensor.shape)));
            }
        }
        let mut value_offsets = vec![];
        let mut count = 0;
        for tensor in tensors {
            value_offsets.push(count);
            count += tensor.trainable_elements() as usize;
        }
        let mut flats = BTreeMap::new();
        let always = [Vector::Values, Vector::Gradients, Vector::Decay];
        for &vector in Vector::ALL.iter().filter(|vector| always.contains(vector) || uses_vector(&manifest, **vector)) {
            flats.insert(vector, allocate(backend.as_mut(), count)?);
        }
        for (i, (tensor, data)) in tensors.iter().zip(&weights).enumerate() {
            let Some((start, _)) = tensor.trainable else { continue };
            let (from, length) = ((start * tensor.row()) as usize, tensor.trainable_elements() as usize);
            backend.write(
                flats[&Vector::Values].allocation,
                value_offsets[i],
                Words::Floats(&data[from..from + length]),
            )?;
            if tensor.decay {
                backend.write(flats[&Vector::Decay].allocation, value_offsets[i], Words::Floats(&vec![1.0; length]))?;
            }
            if let Some(factors) = flats.get(&Vector::LrFactors) {
                let factors_of_tensor = vec![tensor.lr_factor.unwrap_or(1.0) as f32; length];
                backend.write(factors.allocation, value_offsets[i], Words::Floats(&factors_of_tensor))?;
            }
        }
        // A tensor that trains as a whole exists only in the flat vector of values.
        let frozen = tensors.iter().zip(weights);
        let frozen = frozen.map(|(t, data)| (t.trainable_elements() < data.len() as u64).then_some(data)).collect();
        let arena = allocate(backend.as_mut(), 0)?;
        let mut batch =
            || Ok::<_, RuntimeError>(BatchInputs { range: allocate(backend.as_mut(), 0)?, slices: BTreeMap::new() });
        let batches = [batch()?, batch()?];
        let (tensors, prepared) = (vec![None; tensors.len()], HashMap::new());
        let memory = DeviceMemory { tensors, value_offsets, flats, prepared, arena, batches, current: 0 };
        let (plans, poison, profile) = (BTreeMap::new(), false, None);
        let mut session =
            Session { manifest, backend, memory, poison, profile, plans, staged: None, last: None, peak: 0 };
        session.prepare(frozen)?;
        Ok(session)
    }

    /// The manifest of the program that this session runs.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Packs frozen weights. Each tensor is uploaded just before the first launch that reads it, and freed after the
    /// last, so that all weights never exist in packed and unpacked form at once.
    fn prepare(&mut self, mut frozen: Vec<Option<Numbers>>) -> Result<(), RuntimeError> {
        let Session { manifest, backend, memory, .. } = self;
        let launches = &manifest.prepare;
        let sizes = Sizes { values: memory.values() as u64, ..Sizes::default() };
        let (buffers, tensors) = last_reads(manifest, launches);
        let plan = arena::plan(manifest, launches, &[], &sizes);
        memory.grow_arena(backend.as_mut(), plan.size)?;
        for (at, launch) in launches.iter().enumerate() {
            for &id in &launch.buffers {
                let buffer = &manifest.buffers[id];
                match buffer.storage {
                    Storage::Prepared if !memory.prepared.contains_key(&id) => {
                        memory.prepared.insert(id, allocate(backend.as_mut(), buffer.elements(&sizes) as usize)?);
                    }
                    Storage::Tensor { index, .. } => memory.upload(backend.as_mut(), index, &mut frozen)?,
                    _ => {}
                }
            }
            if let Some(launch) = memory.bind(manifest, launch, &sizes, &plan)? {
                backend.run(&[launch], None)?;
            }
            self.peak = self.peak.max(backend.allocated_bytes());
            memory.prepared.retain(|&id, range| {
                let lives = buffers[id] > Some(at);
                if !lives {
                    backend.free(range.allocation);
                }
                lives
            });
            for &id in &launch.buffers {
                if let Storage::Tensor { index, .. } = manifest.buffers[id].storage
                    && tensors[index] <= Some(at)
                    && let Some(range) = memory.tensors[index].take()
                {
                    backend.free(range.allocation);
                }
            }
        }
        for (index, _) in tensors.iter().enumerate().filter(|(_, last)| **last == Some(usize::MAX)) {
            memory.upload(backend.as_mut(), index, &mut frozen)?;
        }
        self.peak = self.peak.max(backend.allocated_bytes());
        backend.wait()
    }

    /// Runs one entry and waits for it. Its outputs stay readable until the next run.
    ///
    /// # Errors
    ///
    /// As [`Session::stage`] and [`Session::start`].
    pub fn run(&mut self, entry: &str, inputs: &Inputs) -> Result<(), RuntimeError> {
        self.stage(&[entry], inputs)?;
        self.start()?;
        self.wait()
    }

    /// Checks the inputs of the next run, whose entries execute in order, and starts their upload. A run in flight goes
    /// on.
    ///
    /// # Errors
    ///
    /// If an entry or an input is missing, or an input has a wrong size or a value out of range.
    pub fn stage(&mut self, entries: &[&str], inputs: &Inputs) -> Result<(), RuntimeError> {
        let Session { manifest, backend, memory, .. } = self;
        if let Some(entry) = entries.iter().find(|entry| !manifest.entries.contains_key(**entry)) {
            let known = manifest.entries.keys().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::Entry { entry: entry.to_string(), known });
        }
        let entries: Vec<String> = entries.iter().map(|entry| entry.to_string()).collect();
        let sizes = inputs.sizes(memory.values())?;
        inputs.check(&manifest.limits, &sizes)?;
        memory.upload_inputs(backend.as_mut(), manifest, &entries, &sizes, inputs)?;
        self.staged = Some(Staged { entries, sizes });
        Ok(())
    }

    /// Starts the staged run. It has ended when [`Session::wait`] returns or an output has been read.
    ///
    /// # Errors
    ///
    /// If there is no memory for the temporaries, or the backend fails.
    ///
    /// # Panics
    ///
    /// If nothing is staged.
    pub fn start(&mut self) -> Result<(), RuntimeError> {
        let Staged { entries, sizes } = self.staged.take().expect("a batch is staged");
        self.last = None;
        let plan = self.plan(&entries, &sizes)?;
        let Session { manifest, backend, memory, .. } = self;
        memory.current ^= 1;
        let mut bound = vec![];
        let mut poisoned = vec![];
        for (launch, first_used) in launches(manifest, &entries).zip(&plan.first_used) {
            if self.poison {
                let range = |&id: &BufferId| memory.locate(manifest, id, &sizes, &plan);
                poisoned.extend(first_used.iter().map(range).collect::<Result<Vec<_>, _>>()?);
            }
            if let Some(launch) = memory.bind(manifest, launch, &sizes, &plan)? {
                bound.push(BoundLaunch { poisoned: std::mem::take(&mut poisoned), ..launch });
            }
        }
        backend.run(&bound, self.profile.as_mut())?;
        self.peak = self.peak.max(backend.allocated_bytes());
        self.last = Some(Run { entries, sizes, plan });
        Ok(())
    }

    /// True if the next run may be started while one is still in flight.
    pub fn overlaps(&self) -> bool {
        self.backend.overlaps() && self.profile.is_none()
    }

    /// Starts reading the first number of each of these outputs of the run that was started last. The read completes
    /// when that run ends; one further run may be started before [`Session::finish_read`] is called.
    ///
    /// # Errors
    ///
    /// If the run has no output of such a name.
    ///
    /// # Panics
    ///
    /// If no run has been started.
    pub fn begin_read(&mut self, names: &[&str]) -> Result<PendingOutputs, RuntimeError> {
        let Run { entries, sizes, plan } = self.last.as_ref().expect("a run has been started");
        let range = |name: &&str| {
            let output = outputs(&self.manifest, entries).find(|o| o.name == *name);
            let output = output.ok_or_else(|| RuntimeError::input(*name, "is no output of this artifact"))?;
            let range = self.memory.locate(&self.manifest, output.buffer, sizes, plan)?;
            Ok(MemoryRange { length: range.length.min(1), ..range })
        };
        let ranges = names.iter().map(range).collect::<Result<Vec<_>, RuntimeError>>()?;
        Ok(PendingOutputs(self.backend.begin_read(&ranges)?))
    }

    /// Waits for a pending read and returns its numbers, in the order of the names.
    ///
    /// # Errors
    ///
    /// If the run failed.
    pub fn finish_read(&mut self, PendingOutputs(pending): PendingOutputs) -> Result<Vec<f32>, RuntimeError> {
        self.backend.finish_read(pending)
    }

    /// Waits for all runs in flight.
    ///
    /// # Errors
    ///
    /// If one of them failed.
    pub fn wait(&mut self) -> Result<(), RuntimeError> {
        self.backend.wait()
    }

    /// The memory plan for a run, with the arena grown to its size. A plan is reused for every batch that exceeds it in
    /// no extent, so after a few batches no plan is computed any more and launches find their buffers at the same
    /// addresses.
    fn plan(&mut self, entries: &[String], sizes: &Sizes) -> Result<Arc<Plan>, RuntimeError> {
        let Session { manifest, backend, memory, plans, .. } = self;
        let known = plans.get(entries);
        if let Some((largest_seen, plan)) = known
            && *largest_seen == largest_seen.max(*sizes)
        {
            memory.grow_arena(backend.as_mut(), plan.size)?;
            return Ok(plan.clone());
        }
        let launches: Vec<Launch> = launches(manifest, entries).cloned().collect();
        let outputs: Vec<Output> = outputs(manifest, entries).cloned().collect();
        let mut planned = |of: Sizes| {
            let plan = arena::plan(manifest, &launches, &outputs, &of);
            memory.grow_arena(backend.as_mut(), plan.size).map(|()| (of, Arc::new(plan)))
        };
        let largest = known.map_or(*sizes, |(largest_seen, _)| largest_seen.max(*sizes));
        // The largest extents of several batches together may not fit although this batch alone does.
        let (of, plan) = planned(largest).or_else(|_| planned(*sizes)).map_err(|error| {
            with_batch_advice(error, sizes, |part| arena::plan(manifest, &launches, &outputs, part).size)
        })?;
        plans.insert(entries.to_vec(), (of, plan.clone()));
        Ok(plan)
    }

    /// Sets the weights whose initial value is computed from other weights; the entry `init` computes them.
    ///
    /// # Errors
    ///
    /// If `init` fails, or one of its outputs is no trainable tensor.
    pub fn initialise(&mut self) -> Result<(), RuntimeError> {
        const INIT: &str = Entry::Init.name();
        if !self.manifest.entries.contains_key(INIT) {
            return Ok(());
        }
        self.run(INIT, &Inputs::default())?;
        for name in self.outputs() {
            let index = self.manifest.tensors.iter().position(|t| t.name == name && t.trainable.is_some());
            let value = self.output(&name).map(|(_, x)| x.to_vec());
            let (Some(index), Some(value)) = (index, value) else {
                return Err(RuntimeError::input(name, "has no value to start from"));
            };
            self.set_values(index, &value)?;
        }
        Ok(())
    }

    /// The shape and the content of an output of the last run, or `None` if the run has no such output.
    pub fn output(&self, name: &str) -> Option<(Vec<u64>, Cow<'_, [f32]>)> {
        let Run { entries, sizes, plan } = self.last.as_ref()?;
        let output = outputs(&self.manifest, entries).find(|o| o.name == name)?;
        let shape: Vec<u64> = output.shape.iter().map(|e| e.eval(sizes)).collect();
        let length = shape.iter().product::<u64>() as usize;
        let range = self.memory.locate(&self.manifest, output.buffer, sizes, plan).ok()?;
        let range = (length <= range.length).then_some(MemoryRange { length, ..range })?;
        Some((shape, self.backend.read(range).ok()?))
    }

    /// The names of the outputs of the last run.
    pub fn outputs(&self) -> Vec<String> {
        let entries = self.last.as_ref().map_or(&[][..], |run| &run.entries);
        outputs(&self.manifest, entries).map(|o| o.name.clone()).collect()
    }

    /// The number of trainable values.
    pub fn trainable(&self) -> usize {
        self.memory.values()
    }

    /// The flat vectors that a training step updates: `values`, the optimizer's moments, and the averages if there are
    /// any.
    pub fn updated_vectors(&self) -> Vec<Vector> {
        Vector::UPDATED.into_iter().filter(|vector| self.memory.flats.contains_key(vector)).collect()
    }

    /// The content of one flat vector.
    ///
    /// # Errors
    ///
    /// If the device fails.
    ///
    /// # Panics
    ///
    /// If the artifact has no such vector.
    pub fn flat(&self, vector: Vector) -> Result<Cow<'_, [f32]>, RuntimeError> {
        self.backend.read(self.memory.flats[&vector])
    }

    /// Overwrites one flat vector.
    ///
    /// # Errors
    ///
    /// If the device fails.
    ///
    /// # Panics
    ///
    /// If `numbers` has another length than the vector.
    pub fn set_flat(&mut self, vector: Vector, numbers: &[f32]) -> Result<(), RuntimeError> {
        let range = self.memory.flats[&vector];
        assert_eq!(numbers.len(), range.length, "all of `{vector}`");
        self.backend.write(range.allocation, 0, Words::Floats(numbers))
    }

    /// The trainable values of tensor `index`.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn values(&self, index: usize) -> Result<Cow<'_, [f32]>, RuntimeError> {
        self.backend.read(self.values_of(index))
    }

    /// Overwrites the trainable values of tensor `index`.
    ///
    /// # Errors
    ///
    /// If the device fails.
    ///
    /// # Panics
    ///
    /// If `values` has another length.
    pub fn set_values(&mut self, index: usize, values: &[f32]) -> Result<(), RuntimeError> {
        let range = self.values_of(index);
        assert_eq!(values.len(), range.length, "all that train of `{}`", self.manifest.tensors[index].name);
        self.backend.write(range.allocation, range.start, Words::Floats(values))
    }

    fn values_of(&self, index: usize) -> MemoryRange {
        let length = self.manifest.tensors[index].trainable_elements() as usize;
        MemoryRange { start: self.memory.value_offsets[index], length, ..self.memory.flats[&Vector::Values] }
    }

    /// The largest amount of device memory held at once so far, in bytes: weights, packed weights, optimizer and
    /// temporaries.
    pub fn peak_bytes(&self) -> u64 {
        self.peak
    }
}

/// True if a launch of an entry reads or writes this flat vector.
fn uses_vector(manifest: &Manifest, vector: Vector) -> bool {
    let launches = manifest.entries.values().flat_map(|entry| &entry.launches);
    launches.flat_map(|launch| &launch.buffers).any(|&id| manifest.buffers[id].storage == Storage::Flat(vector))
}

/// Makes an allocation and returns all of it as a range.
fn allocate(backend: &mut dyn Backend, length: usize) -> Result<MemoryRange, RuntimeError> {
    Ok(MemoryRange { allocation: backend.alloc(length)?, start: 0, length })
}

/// The launches of entries that run in order.
fn launches<'a>(manifest: &'a Manifest, entries: &'a [String]) -> impl Iterator<Item = &'a Launch> {
    entries.iter().flat_map(move |entry| &manifest.entries[entry].launches)
}

fn outputs<'a>(manifest: &'a Manifest, entries: &'a [String]) -> impl Iterator<Item = &'a Output> {
    entries.iter().flat_map(move |entry| &manifest.entries[entry].outputs)
}

/// Extends an out-of-memory error by the largest part of the batch that would fit, if the free bytes are known.
/// `numbers` gives the size of the arena, in 4-byte words, for a batch of given sizes.
fn with_batch_advice(error: RuntimeError, sizes: &Sizes, numbers: impl Fn(&Sizes) -> usize) -> RuntimeError {
    let RuntimeError::Memory { wanted, free: Some(free), ref why, .. } = error else { return error };
    if sizes.sequences == 0 {
        return error;
    }
    let part = |sequences: u64| {
        let share = |n: u64| (n * sequences).div_ceil(sizes.sequences);
        Sizes {
            tokens: share(sizes.tokens),
            sequences,
            targets: share(sizes.targets),
            pairs: share(sizes.pairs),
            values: sizes.values,
        }
    };
    let counts: Vec<u64> = (1..sizes.sequences).collect();
    let fit = counts.partition_point(|&count| 4 * numbers(&part(count)) as u64 <= free) as u64;
    let Sizes { tokens, sequences, .. } = sizes;
    let remedy = match fit {
        0 => format!("the batch has {tokens} tokens in {sequences} sequences, and no part of it would fit"),
        _ => format!(
            "of the batch's {sequences} sequences with {tokens} tokens, {fit} with {} would fit: \
             `--set train.batch={fit}`, and `train.accumulate` makes one step of several batches",
            part(fit).tokens
        ),
    };
    RuntimeError::Memory { wanted, free: Some(free), why: why.clone(), remedy }
}

/// For each buffer and each tensor, the index of the last preparation launch that reads it, or `usize::MAX` if an entry
/// does.
fn last_reads(manifest: &Manifest, launches: &[Launch]) -> (Vec<Option<usize>>, Vec<Option<usize>>) {
    let mut buffers = vec![None; manifest.buffers.len()];
    let mut tensors = vec![None; manifest.tensors.len()];
    let prepare = launches.iter().enumerate().flat_map(|(at, l)| l.buffers.iter().map(move |&b| (at, b)));
    let entries = manifest.entries.values();
    let runs = entries.clone().flat_map(|e| &e.launches).flat_map(|l| &l.buffers);
    let outputs = entries.flat_map(|e| e.outputs.iter().map(|o: &Output| &o.buffer));
    for (at, id) in prepare.chain(runs.chain(outputs).map(|&id| (usize::MAX, id))) {
        buffers[id] = Some(at);
        // Trainable rows are read from the flat vector, not from the tensor.
        if let Storage::Tensor { index, rows } = manifest.buffers[id].storage
            && !manifest.tensors[index].trains(rows)
        {
            tensors[index] = Some(at);
        }
    }
    (buffers, tensors)
}

impl DeviceMemory {
    /// The number of trainable values.
    fn values(&self) -> usize {
        self.flats[&Vector::Values].length
    }

    /// Grows the arena of temporaries to `size` words; its content is lost.
    fn grow_arena(&mut self, backend: &mut dyn Backend, size: usize) -> Result<(), RuntimeError> {
        if size > self.arena.length {
            // The old arena is freed first, so that both never exist at once.
            backend.free(self.arena.allocation);
            self.arena.length = 0;
            self.arena = allocate(backend, size)?;
        }
        Ok(())
    }

    /// Uploads a frozen tensor unless that has been done.
    fn upload(
        &mut self,
        backend: &mut dyn Backend,
        index: usize,
        frozen: &mut [Option<Numbers>],
    ) -> Result<(), RuntimeError> {
        if let Some(numbers) = frozen[index].take() {
            let length = numbers.len();
            self.tensors[index] = Some(MemoryRange { allocation: backend.alloc_with(numbers)?, start: 0, length });
        }
        Ok(())
    }

    /// Packs the inputs of the next run into one allocation and uploads it; each input must have the size that the
    /// launches read.
    fn upload_inputs(
        &mut self,
        backend: &mut dyn Backend,
        manifest: &Manifest,
        entries: &[String],
        sizes: &Sizes,
        inputs: &Inputs,
    ) -> Result<(), RuntimeError> {
        let derived = inputs.derived();
        let BatchInputs { range, slices } = &mut self.batches[self.current ^ 1];
        slices.clear();
        let mut all: Vec<i32> = vec![];
        for &id in launches(manifest, entries).flat_map(|l| &l.buffers) {
            let buffer = &manifest.buffers[id];
            let Storage::Input(name) = &buffer.storage else { continue };
            if slices.contains_key(name) {
                continue;
            }
            let words = match buffer.element {
                Element::I32 => derived.get(&name[..]).or_else(|| inputs.ints.get(name)).map(|x| Words::Ints(x)),
                Element::F32 => inputs.floats.get(name).map(|x| Words::Floats(x)),
            };
            let words = words.ok_or_else(|| RuntimeError::input(name, "is missing"))?;
            let (found, size) = (words.len(), buffer.elements(sizes));
            if found as u64 != size {
                return Err(RuntimeError::input(name, format!("{found} values where this batch needs {size}")));
            }
            slices.insert(name.clone(), (all.len(), found));
            match words {
                Words::Ints(x) => all.extend(x),
                Words::Floats(x) => all.extend(x.iter().map(|x| x.to_bits() as i32)),
            }
            all.resize(all.len().next_multiple_of(CACHE_LINE_FLOATS), 0);
        }
        if range.length < all.len() {
            backend.free(range.allocation);
            range.length = 0;
            *range = allocate(backend, all.len())?;
        }
        backend.write_async(range.allocation, Words::Ints(&all))
    }

    /// Binds a launch to memory and to known sizes; `None` if it has no units.
    fn bind<'a>(
        &self,
        manifest: &Manifest,
        launch: &'a Launch,
        sizes: &Sizes,
        plan: &Plan,
    ) -> Result<Option<BoundLaunch<'a>>, RuntimeError> {
        let ranges = launch.buffers.iter().map(|&id| self.locate(manifest, id, sizes, plan));
        let ranges = ranges.collect::<Result<_, _>>()?;
        let extents = launch.extents.iter().map(|e| e.eval(sizes)).collect();
        let units = launch.units.eval(sizes);
        Ok((units > 0).then_some(BoundLaunch { launch, ranges, extents, units, poisoned: vec![] }))
    }

    /// The memory range of a buffer, checked against its allocation.
    fn locate(
        &self,
        manifest: &Manifest,
        id: BufferId,
        sizes: &Sizes,
        plan: &Plan,
    ) -> Result<MemoryRange, RuntimeError> {
        let buffer: &Buffer = &manifest.buffers[id];
        let length = buffer.elements(sizes) as usize;
        let outside = || RuntimeError::Device(format!("buffer {id} of {length} words is outside its memory"));
        let (allocation, start) = match &buffer.storage {
            Storage::Input(name) => {
                let BatchInputs { range, slices } = &self.batches[self.current];
                let &(start, found) = slices.get(name).ok_or_else(outside)?;
                (MemoryRange { length: start + found, ..*range }, start)
            }
            Storage::Tensor { index, rows } => {
                let tensor = &manifest.tensors[*index];
                let start = rows.map_or(0, |(start, _)| start);
                match tensor.trainable {
                    Some((first, _)) if tensor.trains(*rows) => (
                        self.flats[&Vector::Values],
                        self.value_offsets[*index] + ((start - first) * tensor.row()) as usize,
                    ),
                    _ => {
                        let missing = || RuntimeError::input(&tensor.name, "its values are gone");
                        (self.tensors[*index].ok_or_else(missing)?, (start * tensor.row()) as usize)
                    }
                }
            }
            Storage::Gradient { index } => (self.flats[&Vector::Gradients], self.value_offsets[*index]),
            Storage::Flat(vector) => match self.flats.get(vector) {
                Some(flat) => (*flat, 0),
                None => return Err(RuntimeError::input(vector.name(), "is no vector of the optimizer")),
            },
            Storage::Prepared => (*self.prepared.get(&id).ok_or_else(outside)?, 0),
            Storage::Temporary => (self.arena, *plan.offsets.get(&id).ok_or_else(outside)?),
        };
        if start.checked_add(length).is_none_or(|end| end > allocation.length) {
            return Err(outside());
        }
        Ok(MemoryRange { allocation: allocation.allocation, start, length })
    }
}

#[cfg(test)]
mod tests;
