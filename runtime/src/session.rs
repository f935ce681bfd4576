//! Runs an artifact's entries on the CPU: binds buffers to memory and hands each launch's units to a pool.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::path::Path;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::arena::{self, Plan};
use crate::artifact::{Buffer, Element, Entry, Launch, Manifest, Sizes, Storage};
use crate::error::RuntimeError;
use crate::memory::Numbers;
use crate::validate::{FLAT as FLATS, validate};

/// MLIR's descriptor of a `memref<?xf32>` (or `i32`).
#[repr(C)]
struct Memory {
    allocated: *mut c_void,
    aligned: *mut c_void,
    offset: i64,
    size: i64,
    stride: i64,
}

// SAFETY: it is a place and a size; who may write there is the launches' affair.
unsafe impl Sync for Memory {}

/// A kernel takes an array of pointers to its arguments: of a buffer, a pointer to a pointer to its
/// descriptor (MLIR's packed form of its C interface); of a size or a unit, a pointer to the number.
type Kernel = unsafe extern "C" fn(*mut *mut c_void);

/// A loaded artifact.
pub struct Program {
    pub manifest: Manifest,
    kernels: Vec<Kernel>,
    /// The kernels live in it.
    _library: libloading::Library,
}

impl Program {
    /// Loads the library `path` with the kernels that `manifest` names.
    pub fn new(manifest: Manifest, path: &Path) -> Result<Self, RuntimeError> {
        validate(&manifest).map_err(|why| RuntimeError::artifact(path, why))?;
        // A bare name would send the loader through its search path.
        let file = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        // SAFETY: an artifact's library holds kernels alone: loading it runs no code.
        let library =
            unsafe { libloading::Library::new(file.as_path()) }.map_err(|e| RuntimeError::artifact(path, e))?;
        let kernel = |name: &String| {
            let symbol = format!("_mlir__mlir_ciface_{name}");
            // SAFETY: every kernel has this one signature; the manifest's checksum says it is ours.
            let kernel = unsafe { library.get::<Kernel>(symbol.as_bytes()) };
            kernel.map(|k| *k).map_err(|_| RuntimeError::artifact(path, format!("it lacks the kernel `{name}`")))
        };
        let kernels = manifest.kernels.iter().map(kernel).collect::<Result<_, _>>()?;
        Ok(Program { manifest, kernels, _library: library })
    }
}

/// What a run is given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs {
    /// Tokens of each sequence.
    pub lengths: Vec<i32>,
    /// `ids`, `labels`, `rng`, …
    pub ints: BTreeMap<String, Vec<i32>>,
    /// `hyper`.
    pub floats: BTreeMap<String, Vec<f32>>,
}

impl Inputs {
    /// The batch's sizes, with so many trainable values.
    pub fn sizes(&self, values: usize) -> Result<Sizes, RuntimeError> {
        if let Some(length) = self.lengths.iter().find(|&&n| n <= 0) {
            return Err(RuntimeError::input("lengths", format!("a sequence of {length} tokens")));
        }
        let lengths = self.lengths.iter().map(|&n| n as u64);
        let pairs = lengths.clone().map(|n| n * n).fold(0, u64::saturating_add);
        // Kernels get places among the pairs as i32; tokens are no more than pairs.
        if pairs > i32::MAX as u64 {
            return Err(RuntimeError::input("lengths", "their squares add up to 2³¹ or more; make the batch smaller"));
        }
        Ok(Sizes {
            tokens: lengths.sum(),
            sequences: self.lengths.len() as u64,
            targets: self.ints.get("targets").map_or(0, |t| t.len() as u64),
            pairs,
            values: values as u64,
        })
    }

    /// Checks values whose range is known here; the vocabulary is the tokenizer's matter.
    fn check(&self, sizes: &Sizes) -> Result<(), RuntimeError> {
        for (name, values) in self.ints.iter().filter(|(name, _)| *name != "rng") {
            let limit = if matches!(name.as_str(), "targets" | "starts") { sizes.tokens } else { 1 << 31 };
            if let Some(at) = values.iter().position(|&x| x < 0 || x as u64 >= limit) {
                let message = format!("value {at} is {}; it must lie in 0..{limit}", values[at]);
                return Err(RuntimeError::input(name, message));
            }
        }
        Ok(())
    }

    /// What kernels want to know of the packed axis, beside what was given.
    pub fn derived(&self) -> BTreeMap<&'static str, Vec<i32>> {
        let (mut offsets, mut segments, mut pairs) = (vec![0], vec![], vec![0]);
        let (mut tokens, mut places) = (0, 0);
        for (s, &n) in self.lengths.iter().enumerate() {
            tokens += n;
            offsets.push(tokens);
            for _ in 0..n {
                segments.push(s as i32);
                places += n;
                pairs.push(places);
            }
        }
        BTreeMap::from([("offsets", offsets), ("segments", segments), ("pairs", pairs)])
    }
}

/// How long each operation took in all.
pub type Profile = BTreeMap<String, (Duration, u64)>;

/// A program with weights, and the memory it runs in.
pub struct Session {
    program: Program,
    pool: rayon::ThreadPool,
    /// Frozen tensors (and frozen rows' whole tensors) that a launch still reads.
    tensors: Vec<Option<Numbers>>,
    /// Where each tensor's trainable values begin in the flat vectors.
    places: Vec<usize>,
    flats: BTreeMap<&'static str, Numbers>,
    prepared: HashMap<usize, Numbers>,
    arena: Numbers,
    /// Fills temporaries with NaN where their life begins: what reads what nothing wrote then shows.
    pub poison: bool,
    /// Times launches when it is there.
    pub profile: Option<Profile>,
    /// The last run: its entry, sizes and where its temporaries lie.
    last: Option<(String, Sizes, Plan)>,
    peak: u64,
}

impl Session {
    /// `weights`: every tensor of the manifest, in its order. `threads` 0: as many as there are cores.
    pub fn new(program: Program, weights: Vec<Numbers>, threads: usize) -> Result<Self, RuntimeError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kernels {i}"));
        let pool = pool.build().map_err(|e| RuntimeError::Device(format!("no threads to run on: {e}")))?;
        let tensors = &program.manifest.tensors;
        if weights.len() != tensors.len() {
            let message = format!("{} tensors where the artifact wants {}", weights.len(), tensors.len());
            return Err(RuntimeError::input("weights", message));
        }
        for (tensor, data) in tensors.iter().zip(&weights) {
            if tensor.shape.iter().product::<u64>() != data.len() as u64 {
                return Err(RuntimeError::input(&tensor.name, format!("{} values for {:?}", data.len(), tensor.shape)));
            }
        }
        let mut places = vec![];
        let mut count = 0;
        for tensor in tensors {
            places.push(count);
            count += tensor.trainable_elements() as usize;
        }
        let flats = FLATS.iter().map(|&n| Ok((n, Numbers::try_zeros(count)?)));
        let mut flats: BTreeMap<&'static str, Numbers> = flats.collect::<Result<_, RuntimeError>>()?;
        for (i, (tensor, data)) in tensors.iter().zip(&weights).enumerate() {
            let Some((start, _)) = tensor.trainable else { continue };
            let (from, length) = ((start * tensor.row()) as usize, tensor.trainable_elements() as usize);
            let own = places[i]..places[i] + length;
            flats.get_mut("values").expect("listed")[own.clone()].copy_from_slice(&data[from..from + length]);
            if tensor.decay {
                flats.get_mut("decay").expect("listed")[own].fill(1.0);
            }
        }
        // Tensors that train as a whole live in the flat vector alone.
        let frozen = |(t, data): (&crate::artifact::Tensor, Numbers)| {
            (t.trainable_elements() < t.shape.iter().product()).then_some(data)
        };
        let tensors = tensors.iter().zip(weights).map(frozen).collect();
        let mut session = Session {
            program,
            pool,
            tensors,
            places,
            flats,
            prepared: HashMap::new(),
            arena: Numbers::default(),
            poison: false,
            profile: None,
            last: None,
            peak: 0,
        };
        session.prepare()?;
        Ok(session)
    }

    pub fn manifest(&self) -> &Manifest {
        &self.program.manifest
    }

    /// Packs frozen weights; what only this reads goes as soon as it was read for the last time.
    fn prepare(&mut self) -> Result<(), RuntimeError> {
        // Memory comes and goes between launches, so the program is lent to the loop.
        let launches = std::mem::take(&mut self.program.manifest.prepare);
        let done = self.prepare_by(&launches);
        self.program.manifest.prepare = launches;
        done
    }

    fn prepare_by(&mut self, launches: &[Launch]) -> Result<(), RuntimeError> {
        let sizes = Sizes { values: self.flat("values").len() as u64, ..Sizes::default() };
        let (buffers, tensors) = self.last_reads(launches);
        let plan = arena::plan(&self.program.manifest, launches, &[], &sizes);
        self.arena.ensure(plan.size)?;
        let bound = Bound { ints: BTreeMap::new(), inputs: &Inputs::default(), plan: &plan };
        for (at, launch) in launches.iter().enumerate() {
            for &id in &launch.buffers {
                let buffer = &self.program.manifest.buffers[id];
                if buffer.storage == Storage::Prepared && !self.prepared.contains_key(&id) {
                    self.prepared.insert(id, Numbers::try_zeros(buffer.elements(&sizes) as usize)?);
                }
            }
            let memory = self.memory(std::slice::from_ref(launch), &sizes, &bound)?;
            self.pool.install(|| self.launch(launch, &sizes, &memory, &mut None));
            self.peak = self.peak.max(self.held());
            self.prepared.retain(|&id, _| buffers[id] > Some(at));
            for &id in &launch.buffers {
                if let Storage::Tensor { index, .. } = self.program.manifest.buffers[id].storage
                    && tensors[index] <= Some(at)
                {
                    self.tensors[index] = None;
                }
            }
        }
        for (tensor, last) in self.tensors.iter_mut().zip(tensors) {
            if last.is_none() {
                *tensor = None;
            }
        }
        self.peak = self.peak.max(self.held());
        Ok(())
    }

    /// By buffer and by tensor: the last of the launches that prepare to read it, `usize::MAX` if an entry does.
    fn last_reads(&self, launches: &[Launch]) -> (Vec<Option<usize>>, Vec<Option<usize>>) {
        let manifest = &self.program.manifest;
        let mut buffers = vec![None; manifest.buffers.len()];
        let mut tensors = vec![None; manifest.tensors.len()];
        let prepare = launches.iter().enumerate().flat_map(|(at, l)| l.buffers.iter().map(move |&b| (at, b)));
        let entries = manifest.entries.values();
        let runs = entries.clone().flat_map(|e| &e.launches).flat_map(|l| &l.buffers);
        let outputs = entries.flat_map(|e| e.outputs.iter().map(|o| &o.buffer));
        for (at, id) in prepare.chain(runs.chain(outputs).map(|&id| (usize::MAX, id))) {
            buffers[id] = Some(at);
            if let Storage::Tensor { index, .. } = manifest.buffers[id].storage {
                tensors[index] = Some(at);
            }
        }
        (buffers, tensors)
    }

    /// Runs an entry. Its outputs stay until the next run.
    pub fn run(&mut self, entry: &str, inputs: &Inputs) -> Result<(), RuntimeError> {
        let known = || self.program.manifest.entries.keys().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
        if !self.program.manifest.entries.contains_key(entry) {
            return Err(RuntimeError::Entry { entry: entry.into(), known: known() });
        }
        let sizes = inputs.sizes(self.flat("values").len())?;
        inputs.check(&sizes)?;
        let plan = match self.last.take() {
            Some((last, same, plan)) if last == entry && same == sizes => plan,
            _ => {
                let Entry { launches, outputs } = &self.program.manifest.entries[entry];
                arena::plan(&self.program.manifest, launches, outputs, &sizes)
            }
        };
        self.arena.ensure(plan.size)?;
        let derived = inputs.derived().into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        let bound = Bound { ints: derived, inputs, plan: &plan };
        let launches = &self.program.manifest.entries[entry].launches;
        let memory = self.memory(launches, &sizes, &bound)?;
        let mut profile = self.profile.take();
        self.pool.install(|| {
            for (launch, born) in launches.iter().zip(&plan.born) {
                if self.poison {
                    born.iter().for_each(|id| poison(&memory[id]));
                }
                self.launch(launch, &sizes, &memory, &mut profile);
            }
        });
        self.profile = profile;
        drop(memory);
        self.peak = self.peak.max(self.held());
        self.last = Some((entry.to_string(), sizes, plan));
        Ok(())
    }

    /// Gives weights that start from a value of others that value: the entry `init` computes it.
    pub fn initialise(&mut self) -> Result<(), RuntimeError> {
        const INIT: &str = "init";
        if !self.program.manifest.entries.contains_key(INIT) {
            return Ok(());
        }
        self.run(INIT, &Inputs::default())?;
        for name in self.outputs() {
            let index = self.program.manifest.tensors.iter().position(|t| t.name == name && t.trainable.is_some());
            let value = self.output(&name).map(|(_, x)| x.to_vec());
            let (Some(index), Some(value)) = (index, value) else {
                return Err(RuntimeError::input(name, "has no value to start from"));
            };
            self.values_mut(index).copy_from_slice(&value);
        }
        Ok(())
    }

    /// Shape and content of an output of the last run.
    pub fn output(&self, name: &str) -> Option<(Vec<u64>, &[f32])> {
        let (entry, sizes, plan) = self.last.as_ref()?;
        let output = self.program.manifest.entries[entry].outputs.iter().find(|o| o.name == name)?;
        let shape: Vec<u64> = output.shape.iter().map(|e| e.eval(sizes)).collect();
        let length = shape.iter().product::<u64>() as usize;
        let data = match self.program.manifest.buffers[output.buffer].storage {
            Storage::Temporary => &self.arena[plan.offsets.get(&output.buffer).copied()?..],
            Storage::Gradient { index } => &self.flat("gradients")[self.places[index]..],
            Storage::Prepared => &self.prepared.get(&output.buffer)?[..],
            _ => return None,
        };
        Some((shape, data.get(..length)?))
    }

    /// Names of the last run's outputs.
    pub fn outputs(&self) -> Vec<String> {
        let entry = self.last.as_ref().map(|(entry, ..)| &self.program.manifest.entries[entry]);
        entry.map_or(vec![], |e: &Entry| e.outputs.iter().map(|o| o.name.clone()).collect())
    }

    /// One of the optimizer's vectors: `values`, `gradients`, `m`, `v`, `decay`.
    pub fn flat(&self, name: &str) -> &[f32] {
        &self.flats[name]
    }

    pub fn flat_mut(&mut self, name: &str) -> &mut [f32] {
        self.flats.get_mut(name).expect("one of the flat vectors")
    }

    /// The trainable values of tensor `index`, as they are now.
    pub fn values(&self, index: usize) -> &[f32] {
        let length = self.program.manifest.tensors[index].trainable_elements() as usize;
        &self.flat("values")[self.places[index]..self.places[index] + length]
    }

    pub fn values_mut(&mut self, index: usize) -> &mut [f32] {
        let length = self.program.manifest.tensors[index].trainable_elements() as usize;
        let start = self.places[index];
        &mut self.flat_mut("values")[start..start + length]
    }

    /// The most memory weights, packed weights, optimizer and temporaries took at once, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.peak
    }

    fn held(&self) -> u64 {
        let tensors = self.tensors.iter().flatten().map(Numbers::bytes).sum::<u64>();
        let prepared = self.prepared.values().map(Numbers::bytes).sum::<u64>();
        let flats = self.flats.values().map(Numbers::bytes).sum::<u64>();
        tensors + prepared + flats + self.arena.bytes()
    }

    /// Descriptors of all buffers that `launches` name.
    fn memory(
        &self,
        launches: &[Launch],
        sizes: &Sizes,
        bound: &Bound,
    ) -> Result<HashMap<usize, Memory>, RuntimeError> {
        let mut memory = HashMap::new();
        for &id in launches.iter().flat_map(|l| &l.buffers) {
            if memory.contains_key(&id) {
                continue;
            }
            let buffer = &self.program.manifest.buffers[id];
            let size = buffer.elements(sizes) as usize;
            let start = self.locate(id, buffer, size, bound)?;
            memory.insert(id, Memory { allocated: start, aligned: start, offset: 0, size: size as i64, stride: 1 });
        }
        Ok(memory)
    }

    /// Where a buffer of `size` elements begins; checks that what is bound to it has that size.
    fn locate(&self, id: usize, buffer: &Buffer, size: usize, bound: &Bound) -> Result<*mut c_void, RuntimeError> {
        let check = |name: &str, found: Option<usize>| match found {
            Some(found) if found == size => Ok(()),
            Some(found) => Err(RuntimeError::input(name, format!("{found} values where this batch needs {size}"))),
            None => Err(RuntimeError::input(name, "is missing")),
        };
        let outside = || RuntimeError::Device(format!("buffer {id} of {size} numbers lies outside its memory"));
        let (numbers, start) = match &buffer.storage {
            Storage::Input(name) if buffer.element == Element::I32 => {
                let data = bound.ints.get(name).or_else(|| bound.inputs.ints.get(name));
                check(name, data.map(Vec::len))?;
                return Ok(data.map_or(std::ptr::null(), |d| d.as_ptr()).cast_mut().cast());
            }
            Storage::Input(name) => {
                let data = bound.inputs.floats.get(name);
                check(name, data.map(Vec::len))?;
                return Ok(data.map_or(std::ptr::null(), |d| d.as_ptr()).cast_mut().cast());
            }
            Storage::Tensor { index, rows } => {
                let tensor = &self.program.manifest.tensors[*index];
                let start = rows.map_or(0, |(start, _)| start);
                match tensor.trainable {
                    Some((first, _)) if tensor.trains(*rows) => {
                        (&self.flats["values"], self.places[*index] + ((start - first) * tensor.row()) as usize)
                    }
                    _ => {
                        let missing = || RuntimeError::input(&tensor.name, "its values are gone");
                        (self.tensors[*index].as_ref().ok_or_else(missing)?, (start * tensor.row()) as usize)
                    }
                }
            }
            Storage::Gradient { index } => (&self.flats["gradients"], self.places[*index]),
            Storage::Flat(name) => match self.flats.get(name.as_str()) {
                Some(flat) => (flat, 0),
                None => return Err(RuntimeError::input(name, "is no vector of the optimizer")),
            },
            Storage::Prepared => (self.prepared.get(&id).ok_or_else(outside)?, 0),
            Storage::Temporary => (&self.arena, *bound.plan.offsets.get(&id).ok_or_else(outside)?),
        };
        if start.checked_add(size).is_none_or(|end| end > numbers.len()) {
            return Err(outside());
        }
        // SAFETY: within the numbers, as just checked.
        Ok(unsafe { numbers.cells().add(start) }.cast())
    }

    fn launch(&self, launch: &Launch, sizes: &Sizes, memory: &HashMap<usize, Memory>, profile: &mut Option<Profile>) {
        let units = launch.units.eval(sizes) as i64;
        if units == 0 {
            return;
        }
        let begun = profile.as_ref().map(|_| Instant::now());
        let buffers: Vec<usize> = launch.buffers.iter().map(|id| &memory[id] as *const Memory as usize).collect();
        let extents: Vec<i64> = launch.extents.iter().map(|e| e.eval(sizes) as i64).collect();
        let kernel = self.program.kernels[launch.kernel];
        let run = |begin: i64, end: i64| {
            let mut buffers = buffers.clone();
            let mut numbers = extents.clone();
            numbers.extend([begin, end]);
            let pointers = buffers.iter_mut().map(|b| (b as *mut usize).cast::<c_void>());
            let mut arguments: Vec<*mut c_void> =
                pointers.chain(numbers.iter_mut().map(|n| (n as *mut i64).cast())).collect();
            // SAFETY: the manifest names the kernel's arguments in order, every buffer has the size the
            // manifest gives it (checked when it was bound), and ranges of units write apart.
            unsafe { kernel(arguments.as_mut_ptr()) };
        };
        let work: i64 = launch.buffers.iter().map(|id| memory[id].size).max().unwrap_or(0);
        let parts = (4 * self.pool.current_num_threads() as i64).min(units);
        if parts == 1 || work < 4096 {
            run(0, units);
        } else {
            (0..parts).into_par_iter().for_each(|part| run(units * part / parts, units * (part + 1) / parts));
        }
        if let (Some(profile), Some(begun)) = (profile, begun) {
            let entry = profile.entry(launch.op.clone()).or_default();
            entry.0 += begun.elapsed();
            entry.1 += 1;
        }
    }
}

/// Makes every number of a temporary NaN.
fn poison(place: &Memory) {
    // SAFETY: it lies in the arena, which only the session uses, and no launch runs now.
    unsafe { std::slice::from_raw_parts_mut(place.aligned.cast::<f32>(), place.size as usize) }.fill(f32::NAN);
}

/// What a run's inputs are bound to.
struct Bound<'a> {
    ints: BTreeMap<String, Vec<i32>>,
    inputs: &'a Inputs,
    plan: &'a Plan,
}

#[cfg(test)]
mod tests;
