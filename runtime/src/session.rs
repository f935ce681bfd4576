//! Runs an artifact's entries: binds buffers to memory and hands the launches to a backend.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::arena::{self, Plan};
use crate::artifact::{Buffer, BufferId, Element, Entry, Launch, Manifest, Output, Sizes, Storage};
use crate::backend::{Backend, Job, Place, Profile, Words};
use crate::cpu::{Cpu, Library};
use crate::cuda::Cuda;
use crate::error::RuntimeError;
use crate::memory::Numbers;
use crate::validate::{FLAT as FLATS, validate};

/// A loaded artifact.
pub struct Program {
    pub manifest: Manifest,
    code: Code,
}

enum Code {
    Library(Library),
    Ptx(String),
}

impl Program {
    /// Loads the library or the PTX at `path` with the kernels that `manifest` names.
    pub fn new(manifest: Manifest, path: &Path) -> Result<Self, RuntimeError> {
        validate(&manifest).map_err(|why| RuntimeError::artifact(path, why))?;
        let code = match manifest.gpu() {
            Some(_) => Code::Ptx(std::fs::read_to_string(path).map_err(|e| RuntimeError::artifact(path, e))?),
            None => Code::Library(Library::load(path, &manifest.kernels)?),
        };
        Ok(Program { manifest, code })
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

/// A program with weights, and the memory it runs in.
pub struct Session {
    manifest: Manifest,
    backend: Box<dyn Backend>,
    home: Home,
    /// Fills temporaries with NaN where their life begins: what reads what nothing wrote then shows.
    pub poison: bool,
    /// Times launches when it is there.
    pub profile: Option<Profile>,
    /// The last run: its entry, sizes and where its temporaries lie.
    last: Option<(String, Sizes, Plan)>,
    peak: u64,
}

/// Where everything lies.
struct Home {
    /// Frozen tensors (and frozen rows' whole tensors) that a launch still reads.
    tensors: Vec<Option<Place>>,
    /// Where each tensor's trainable values begin in the flat vectors.
    places: Vec<usize>,
    flats: BTreeMap<&'static str, Place>,
    prepared: HashMap<BufferId, Place>,
    arena: Place,
    /// What was given, by name; room for more than that, perhaps.
    inputs: BTreeMap<String, Place>,
}

impl Session {
    /// `weights`: every tensor of the manifest, in its order. `threads` of a processor, 0 for as many as it has cores.
    pub fn new(program: Program, weights: Vec<Numbers>, threads: usize) -> Result<Self, RuntimeError> {
        let Program { manifest, code } = program;
        let backend: Box<dyn Backend> = match code {
            Code::Library(library) => Box::new(Cpu::new(library, threads)?),
            Code::Ptx(text) => Box::new(Cuda::new(&text, &manifest.kernels)?),
        };
        Session::on(backend, manifest, weights)
    }

    /// The same on any backend, which knows the manifest's kernels.
    pub fn on(mut backend: Box<dyn Backend>, manifest: Manifest, weights: Vec<Numbers>) -> Result<Self, RuntimeError> {
        let tensors = &manifest.tensors;
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
        let mut flats = BTreeMap::new();
        for name in FLATS {
            flats.insert(name, whole(backend.as_mut(), count)?);
        }
        for (i, (tensor, data)) in tensors.iter().zip(&weights).enumerate() {
            let Some((start, _)) = tensor.trainable else { continue };
            let (from, length) = ((start * tensor.row()) as usize, tensor.trainable_elements() as usize);
            backend.write(flats["values"].block, places[i], Words::Floats(&data[from..from + length]))?;
            if tensor.decay {
                backend.write(flats["decay"].block, places[i], Words::Floats(&vec![1.0; length]))?;
            }
        }
        // Tensors that train as a whole live in the flat vector alone.
        let mut frozen = vec![];
        for (tensor, data) in tensors.iter().zip(weights) {
            let length = data.len();
            let lives = tensor.trainable_elements() < length as u64;
            let place = lives.then(|| backend.take(data)).transpose()?;
            frozen.push(place.map(|block| Place { block, start: 0, length }));
        }
        let arena = whole(backend.as_mut(), 0)?;
        let (prepared, inputs) = (HashMap::new(), BTreeMap::new());
        let home = Home { tensors: frozen, places, flats, prepared, arena, inputs };
        let mut session = Session { manifest, backend, home, poison: false, profile: None, last: None, peak: 0 };
        session.prepare()?;
        Ok(session)
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Packs frozen weights; what only this reads goes as soon as it was read for the last time.
    fn prepare(&mut self) -> Result<(), RuntimeError> {
        let Session { manifest, backend, home, .. } = self;
        let launches = &manifest.prepare;
        let sizes = Sizes { values: home.values() as u64, ..Sizes::default() };
        let (buffers, tensors) = last_reads(manifest, launches);
        let plan = arena::plan(manifest, launches, &[], &sizes);
        home.grow_arena(backend.as_mut(), plan.size)?;
        for (at, launch) in launches.iter().enumerate() {
            for &id in &launch.buffers {
                let buffer = &manifest.buffers[id];
                if buffer.storage == Storage::Prepared && !home.prepared.contains_key(&id) {
                    home.prepared.insert(id, whole(backend.as_mut(), buffer.elements(&sizes) as usize)?);
                }
            }
            if let Some(job) = home.job(manifest, launch, &sizes, &plan)? {
                backend.run(&[job], None)?;
            }
            self.peak = self.peak.max(backend.held());
            home.prepared.retain(|&id, place| {
                let lives = buffers[id] > Some(at);
                if !lives {
                    backend.free(place.block);
                }
                lives
            });
            for &id in &launch.buffers {
                if let Storage::Tensor { index, .. } = manifest.buffers[id].storage
                    && tensors[index] <= Some(at)
                    && let Some(place) = home.tensors[index].take()
                {
                    backend.free(place.block);
                }
            }
        }
        for (tensor, last) in home.tensors.iter_mut().zip(tensors) {
            if last.is_none()
                && let Some(place) = tensor.take()
            {
                backend.free(place.block);
            }
        }
        self.peak = self.peak.max(backend.held());
        Ok(())
    }

    /// Runs an entry. Its outputs stay until the next run.
    pub fn run(&mut self, entry: &str, inputs: &Inputs) -> Result<(), RuntimeError> {
        let Session { manifest, backend, home, .. } = self;
        let Some(Entry { launches, outputs }) = manifest.entries.get(entry) else {
            let known = manifest.entries.keys().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::Entry { entry: entry.into(), known });
        };
        let sizes = inputs.sizes(home.values())?;
        inputs.check(&sizes)?;
        let plan = match self.last.take() {
            Some((last, same, plan)) if last == entry && same == sizes => plan,
            _ => arena::plan(manifest, launches, outputs, &sizes),
        };
        home.grow_arena(backend.as_mut(), plan.size)?;
        home.bind(backend.as_mut(), manifest, launches, &sizes, inputs)?;
        let mut jobs = vec![];
        let mut poisoned = vec![];
        for (launch, born) in launches.iter().zip(&plan.born) {
            if self.poison {
                let place = |&id: &BufferId| home.locate(manifest, id, &sizes, &plan);
                poisoned.extend(born.iter().map(place).collect::<Result<Vec<_>, _>>()?);
            }
            if let Some(job) = home.job(manifest, launch, &sizes, &plan)? {
                jobs.push(Job { poisoned: std::mem::take(&mut poisoned), ..job });
            }
        }
        backend.run(&jobs, self.profile.as_mut())?;
        self.peak = self.peak.max(backend.held());
        self.last = Some((entry.to_string(), sizes, plan));
        Ok(())
    }

    /// Gives weights that start from a value of others that value: the entry `init` computes it.
    pub fn initialise(&mut self) -> Result<(), RuntimeError> {
        const INIT: &str = "init";
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

    /// Shape and content of an output of the last run.
    pub fn output(&self, name: &str) -> Option<(Vec<u64>, Cow<'_, [f32]>)> {
        let (entry, sizes, plan) = self.last.as_ref()?;
        let output = self.manifest.entries[entry].outputs.iter().find(|o| o.name == name)?;
        let shape: Vec<u64> = output.shape.iter().map(|e| e.eval(sizes)).collect();
        let length = shape.iter().product::<u64>() as usize;
        let place = self.home.locate(&self.manifest, output.buffer, sizes, plan).ok()?;
        let place = (length <= place.length).then_some(Place { length, ..place })?;
        Some((shape, self.backend.read(place).ok()?))
    }

    /// Names of the last run's outputs.
    pub fn outputs(&self) -> Vec<String> {
        let entry = self.last.as_ref().map(|(entry, ..)| &self.manifest.entries[entry]);
        entry.map_or(vec![], |e: &Entry| e.outputs.iter().map(|o| o.name.clone()).collect())
    }

    /// How many values train.
    pub fn trainable(&self) -> usize {
        self.home.values()
    }

    /// One of the optimizer's vectors: `values`, `gradients`, `m`, `v`, `decay`.
    pub fn flat(&self, name: &str) -> Result<Cow<'_, [f32]>, RuntimeError> {
        self.backend.read(self.home.flats[name])
    }

    /// Gives one of them other numbers, as many as it has.
    pub fn set_flat(&mut self, name: &str, numbers: &[f32]) -> Result<(), RuntimeError> {
        let place = self.home.flats[name];
        assert_eq!(numbers.len(), place.length, "all of `{name}`");
        self.backend.write(place.block, 0, Words::Floats(numbers))
    }

    /// The trainable values of tensor `index`, as they are now.
    pub fn values(&self, index: usize) -> Result<Cow<'_, [f32]>, RuntimeError> {
        self.backend.read(self.values_of(index))
    }

    /// Gives them others.
    pub fn set_values(&mut self, index: usize, values: &[f32]) -> Result<(), RuntimeError> {
        let place = self.values_of(index);
        assert_eq!(values.len(), place.length, "all that train of `{}`", self.manifest.tensors[index].name);
        self.backend.write(place.block, place.start, Words::Floats(values))
    }

    fn values_of(&self, index: usize) -> Place {
        let length = self.manifest.tensors[index].trainable_elements() as usize;
        Place { start: self.home.places[index], length, ..self.home.flats["values"] }
    }

    /// The most memory weights, packed weights, optimizer and temporaries took at once, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.peak
    }
}

/// A block of its own.
fn whole(backend: &mut dyn Backend, length: usize) -> Result<Place, RuntimeError> {
    Ok(Place { block: backend.alloc(length)?, start: 0, length })
}

/// By buffer and by tensor: the last of the launches that prepare to read it, `usize::MAX` if an entry does.
fn last_reads(manifest: &Manifest, launches: &[Launch]) -> (Vec<Option<usize>>, Vec<Option<usize>>) {
    let mut buffers = vec![None; manifest.buffers.len()];
    let mut tensors = vec![None; manifest.tensors.len()];
    let prepare = launches.iter().enumerate().flat_map(|(at, l)| l.buffers.iter().map(move |&b| (at, b)));
    let entries = manifest.entries.values();
    let runs = entries.clone().flat_map(|e| &e.launches).flat_map(|l| &l.buffers);
    let outputs = entries.flat_map(|e| e.outputs.iter().map(|o: &Output| &o.buffer));
    for (at, id) in prepare.chain(runs.chain(outputs).map(|&id| (usize::MAX, id))) {
        buffers[id] = Some(at);
        if let Storage::Tensor { index, .. } = manifest.buffers[id].storage {
            tensors[index] = Some(at);
        }
    }
    (buffers, tensors)
}

impl Home {
    /// How many values train.
    fn values(&self) -> usize {
        self.flats["values"].length
    }

    /// Makes room for `size` temporaries; what was there need not stay.
    fn grow_arena(&mut self, backend: &mut dyn Backend, size: usize) -> Result<(), RuntimeError> {
        if size > self.arena.length {
            // Never both the old and the new one at once.
            backend.free(self.arena.block);
            self.arena.length = 0;
            self.arena = whole(backend, size)?;
        }
        Ok(())
    }

    /// Brings what was given to where the launches read it; checks that it has the size they want.
    fn bind(
        &mut self,
        backend: &mut dyn Backend,
        manifest: &Manifest,
        launches: &[Launch],
        sizes: &Sizes,
        inputs: &Inputs,
    ) -> Result<(), RuntimeError> {
        let derived = inputs.derived();
        let mut bound = vec![];
        for &id in launches.iter().flat_map(|l| &l.buffers) {
            let buffer = &manifest.buffers[id];
            let Storage::Input(name) = &buffer.storage else { continue };
            if bound.contains(&name) {
                continue;
            }
            bound.push(name);
            let words = match buffer.element {
                Element::I32 => derived.get(&name[..]).or_else(|| inputs.ints.get(name)).map(|x| Words::Ints(x)),
                Element::F32 => inputs.floats.get(name).map(|x| Words::Floats(x)),
            };
            let words = words.ok_or_else(|| RuntimeError::input(name, "is missing"))?;
            let (found, size) = (words.len(), buffer.elements(sizes));
            if found as u64 != size {
                return Err(RuntimeError::input(name, format!("{found} values where this batch needs {size}")));
            }
            let place = match self.inputs.get(name) {
                Some(place) if place.length >= found => *place,
                other => {
                    if let Some(small) = other {
                        backend.free(small.block);
                    }
                    self.inputs.remove(name);
                    whole(backend, found)?
                }
            };
            self.inputs.insert(name.clone(), place);
            backend.write(place.block, 0, words)?;
        }
        Ok(())
    }

    /// A launch for sizes that are known; `None` when there is nothing to do.
    fn job<'a>(
        &self,
        manifest: &Manifest,
        launch: &'a Launch,
        sizes: &Sizes,
        plan: &Plan,
    ) -> Result<Option<Job<'a>>, RuntimeError> {
        let places = launch.buffers.iter().map(|&id| self.locate(manifest, id, sizes, plan));
        let places = places.collect::<Result<_, _>>()?;
        let extents = launch.extents.iter().map(|e| e.eval(sizes)).collect();
        let units = launch.units.eval(sizes);
        Ok((units > 0).then_some(Job { launch, places, extents, units, poisoned: vec![] }))
    }

    /// Where a buffer lies, within its block.
    fn locate(&self, manifest: &Manifest, id: BufferId, sizes: &Sizes, plan: &Plan) -> Result<Place, RuntimeError> {
        let buffer: &Buffer = &manifest.buffers[id];
        let length = buffer.elements(sizes) as usize;
        let outside = || RuntimeError::Device(format!("buffer {id} of {length} numbers lies outside its memory"));
        let (block, start) = match &buffer.storage {
            Storage::Input(name) => (*self.inputs.get(name).ok_or_else(outside)?, 0),
            Storage::Tensor { index, rows } => {
                let tensor = &manifest.tensors[*index];
                let start = rows.map_or(0, |(start, _)| start);
                match tensor.trainable {
                    Some((first, _)) if tensor.trains(*rows) => {
                        (self.flats["values"], self.places[*index] + ((start - first) * tensor.row()) as usize)
                    }
                    _ => {
                        let missing = || RuntimeError::input(&tensor.name, "its values are gone");
                        (self.tensors[*index].ok_or_else(missing)?, (start * tensor.row()) as usize)
                    }
                }
            }
            Storage::Gradient { index } => (self.flats["gradients"], self.places[*index]),
            Storage::Flat(name) => match self.flats.get(name.as_str()) {
                Some(flat) => (*flat, 0),
                None => return Err(RuntimeError::input(name, "is no vector of the optimizer")),
            },
            Storage::Prepared => (*self.prepared.get(&id).ok_or_else(outside)?, 0),
            Storage::Temporary => (self.arena, *plan.offsets.get(&id).ok_or_else(outside)?),
        };
        if start.checked_add(length).is_none_or(|end| end > block.length) {
            return Err(outside());
        }
        Ok(Place { block: block.block, start, length })
    }
}

#[cfg(test)]
mod tests;
