//! Runs the entries of an artifact.
//!
//! A [`Program`] is an artifact in memory; a [`Session`] adds weights and threads. Everything that trains
//! lies in one flat vector, `values`, in the order of the manifest's tensors; `gradients`, `m`, `v` and
//! `decay` are its twins. Temporaries of an entry share one arena, planned for the sizes of the batch.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::artifact::{BufferId, Element, Entry, Extent, Launch, Manifest, Sizes, Storage};
use crate::batch::{Batch, BatchError};
use crate::kernels::{Call, Descriptor, Kernels, LibraryError};
use crate::layout::Layout;
use crate::memory::{Floats, TensorData};
use crate::pool::Pool;
use crate::store::{self, StoreError};
use crate::validate::{mentions, validate};
use crate::weights::Weights;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Library(#[from] LibraryError),
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error("the manifest is damaged: {0}; compile the artifact again with `peftc compile`")]
    Manifest(String),
    #[error("the artifact has no entry `{name}`; it has {known}. Compile it with `--entry {name}`")]
    Entry { name: String, known: String },
    #[error("the weights lack `{name}`, which the artifact wants")]
    Missing { name: String },
    #[error("`{name}` has {found} values, but the artifact wants {expected}")]
    Size { name: String, found: usize, expected: u64 },
    #[error("{bytes} bytes for {what} cannot be had: {source}; make the batch smaller or free memory")]
    Memory { what: &'static str, bytes: u64, source: std::io::Error },
    #[error("the threads cannot be started: {0}; ask for fewer with `--threads`")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// An artifact whose kernels are loaded.
#[derive(Debug)]
pub struct Program {
    manifest: Manifest,
    kernels: Kernels,
}

impl Program {
    /// Loads the artifact directory `path`.
    pub fn load(path: &Path) -> Result<Self, RunError> {
        let (manifest, library) = store::load(path)?;
        Program::new(manifest, &library)
    }

    /// A program that was never stored.
    pub fn new(manifest: Manifest, library: &Path) -> Result<Self, RunError> {
        validate(&manifest).map_err(RunError::Manifest)?;
        let kernels = Kernels::load(library, &manifest.kernels)?;
        Ok(Program { manifest, kernels })
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

/// The optimizer's vectors over all trainable values, in the order of the manifest's tensors.
#[derive(Debug, Default)]
pub struct Flat {
    pub values: Floats,
    pub gradients: Floats,
    pub m: Floats,
    pub v: Floats,
    /// 1 where weight decay applies, else 0.
    pub decay: Floats,
}

/// Time spent in the launches of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    pub time: Duration,
    pub launches: u64,
}

/// A program with its weights, ready to run.
#[derive(Debug)]
pub struct Session {
    program: Arc<Program>,
    pool: Pool,
    /// By tensor; `None` where every row trains or nothing reads it any more.
    frozen: Vec<Option<TensorData>>,
    /// By tensor: where its trainable values lie in the flat vectors.
    spans: Vec<Option<Range<usize>>>,
    flat: Flat,
    prepared: HashMap<BufferId, Floats>,
    arena: Floats,
    /// By entry: the plan of its last batch.
    plans: HashMap<String, (Sizes, Arc<Layout>)>,
    profile: Option<BTreeMap<String, Spent>>,
    poison: bool,
    peak: u64,
}

impl Session {
    /// Takes the weights the program wants out of `weights`, prepares what is packed once and lets go of what is
    /// not read afterwards. `threads` 0 = as many as there are cores.
    pub fn new(program: Arc<Program>, mut weights: Weights, threads: usize) -> Result<Self, RunError> {
        let manifest = &program.manifest;
        let total: u64 = manifest.tensors.iter().map(|t| t.trainable_elements()).sum();
        let vector = |what| memory(what, total);
        let mut flat = Flat {
            values: vector("the trainable values")?,
            gradients: vector("gradients")?,
            m: vector("the optimizer's state")?,
            v: vector("the optimizer's state")?,
            decay: vector("the optimizer's state")?,
        };
        let (mut frozen, mut spans, mut next) = (vec![], vec![], 0);
        for tensor in &manifest.tensors {
            let data = weights.take(&tensor.name).ok_or(RunError::Missing { name: tensor.name.clone() })?;
            let (source, expected) = (data.as_slice(), tensor.shape.iter().product::<u64>());
            if source.len() as u64 != expected {
                return Err(RunError::Size { name: tensor.name.clone(), found: source.len(), expected });
            }
            let Some((start, end)) = tensor.trainable else {
                spans.push(None);
                frozen.push(Some(data));
                continue;
            };
            let row = tensor.shape.iter().skip(1).product::<u64>() as usize;
            let rows = start as usize * row..end as usize * row;
            let span = next..next + rows.len();
            next = span.end;
            flat.values[span.clone()].copy_from_slice(&source[rows.clone()]);
            flat.decay[span.clone()].fill(f32::from(u8::from(tensor.decay)));
            spans.push(Some(span));
            frozen.push((rows.len() < source.len()).then_some(data));
        }
        let pool = Pool::new(threads)?;
        let mut session = Session {
            program: program.clone(),
            pool,
            frozen,
            spans,
            flat,
            prepared: HashMap::new(),
            arena: Floats::default(),
            plans: HashMap::new(),
            profile: None,
            poison: false,
            peak: 0,
        };
        session.prepare()?;
        Ok(session)
    }
}

// Preparing.
impl Session {
    /// Packs frozen weights; what only this reads is freed as soon as it has been read.
    fn prepare(&mut self) -> Result<(), RunError> {
        let program = self.program.clone();
        let (manifest, launches) = (&program.manifest, &program.manifest.prepare);
        let sizes = Sizes { values: self.flat.values.len() as u64, ..Sizes::default() };
        // Until which launch each packed buffer and each frozen tensor is needed; entries need theirs for ever.
        let mut buffers = vec![None; manifest.buffers.len()];
        let mut tensors = vec![None; manifest.tensors.len()];
        let prepared = launches.iter().enumerate().flat_map(|(at, l)| l.buffers.iter().map(move |&b| (at, b)));
        let entries = manifest.entries.values().flat_map(|e| named(e).map(|&b| (usize::MAX, b)));
        for (at, id) in prepared.chain(entries) {
            buffers[id] = Some(at);
            if let Storage::Tensor { index, .. } = manifest.buffers[id].storage {
                tensors[index] = Some(at);
            }
        }
        let release = |frozen: &mut [Option<TensorData>], at: Option<usize>| {
            frozen.iter_mut().zip(&tensors).filter(|(_, last)| **last == at).for_each(|(data, _)| *data = None);
        };
        release(&mut self.frozen, None);
        let layout = Layout::new(manifest, launches, [].iter(), &sizes);
        self.grow_arena(&layout)?;
        for (at, launch) in launches.iter().enumerate() {
            for &id in &launch.buffers {
                if manifest.buffers[id].storage == Storage::Prepared && !self.prepared.contains_key(&id) {
                    let elements = manifest.buffers[id].elements(&sizes);
                    self.prepared.insert(id, memory("packed weights", elements)?);
                }
            }
            self.note_peak();
            let locate = |&id: &BufferId| self.locate(id, &sizes, &layout, &HashMap::new()).map(|d| (id, d));
            let table = launch.buffers.iter().map(locate).collect::<Result<_, _>>()?;
            self.pool.enter(|| execute(&program, &self.pool, launch, &table, &sizes));
            self.prepared.retain(|&id, _| buffers[id].is_some_and(|last| last > at));
            release(&mut self.frozen, Some(at));
        }
        // Packed weights that no launch fills would be read as zeros.
        let unfilled = entries_unfilled(manifest, &self.prepared);
        unfilled.map_or(Ok(()), |id| Err(RunError::Manifest(format!("nothing fills the packed buffer {id}"))))
    }
}

/// The buffers an entry names, repeatedly.
fn named(entry: &Entry) -> impl Iterator<Item = &BufferId> {
    entry.launches.iter().flat_map(|l| &l.buffers).chain(entry.outputs.iter().map(|o| &o.buffer))
}

fn entries_unfilled(manifest: &Manifest, prepared: &HashMap<BufferId, Floats>) -> Option<BufferId> {
    let packed = |id: &BufferId| manifest.buffers[*id].storage == Storage::Prepared;
    manifest.entries.values().flat_map(named).copied().find(|id| packed(id) && !prepared.contains_key(id))
}

fn memory(what: &'static str, elements: u64) -> Result<Floats, RunError> {
    usize::try_from(elements)
        .map_err(|_| std::io::ErrorKind::OutOfMemory.into())
        .and_then(Floats::zeroed)
        .map_err(|source| RunError::Memory { what, bytes: elements.saturating_mul(4), source })
}

// Running.
impl Session {
    /// Runs `entry` on a batch. What it computes stays until the next run.
    pub fn run(&mut self, entry: &str, batch: &Batch) -> Result<Outputs<'_>, RunError> {
        let program = self.program.clone();
        let manifest = &program.manifest;
        let work = manifest.entries.get(entry).ok_or_else(|| RunError::Entry {
            name: entry.into(),
            known: manifest.entries.keys().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", "),
        })?;
        let sizes = batch.sizes(self.flat.values.len() as u64)?;
        batch.check_values(&sizes)?;
        check_sizes(entry, work, manifest, &sizes)?;
        let integers = batch.integers();
        let inputs = bind(entry, work, manifest, &sizes, batch, &integers)?;
        let layout = match self.plans.get(entry) {
            Some((planned, layout)) if *planned == sizes => layout.clone(),
            _ => Arc::new(Layout::new(manifest, &work.launches, work.outputs.iter().map(|o| &o.buffer), &sizes)),
        };
        self.plans.insert(entry.into(), (sizes, layout.clone()));
        self.grow_arena(&layout)?;
        self.note_peak();
        let locate = |&id: &BufferId| self.locate(id, &sizes, &layout, &inputs).map(|d| (id, d));
        let table: Table = named(work).map(locate).collect::<Result<_, _>>()?;

        let mut profile = self.profile.take();
        self.pool.enter(|| {
            for (at, launch) in work.launches.iter().enumerate() {
                if self.poison {
                    layout.born(at).iter().for_each(|id| poison(&table[id]));
                }
                let start = profile.is_some().then(Instant::now);
                execute(&program, &self.pool, launch, &table, &sizes);
                if let (Some(profile), Some(start)) = (&mut profile, start) {
                    let spent = profile.entry(launch.op.clone()).or_default();
                    spent.time += start.elapsed();
                    spent.launches += 1;
                }
            }
        });
        self.profile = profile;
        self.outputs(entry, &table, &sizes)
    }

    fn outputs(&self, entry: &str, table: &Table, sizes: &Sizes) -> Result<Outputs<'_>, RunError> {
        let outputs = &self.program.manifest.entries[entry].outputs;
        let list = outputs.iter().map(|output| {
            let shape: Vec<u64> = output.shape.iter().map(|e| e.eval(sizes)).collect();
            let place = &table[&output.buffer];
            if shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)) != Some(place.size as u64) {
                return Err(RunError::Manifest(format!("output `{}` has not the size of its buffer", output.name)));
            }
            // SAFETY: the descriptor lies in memory this session owns and has written zeros or results to,
            // no kernel runs any more, and the borrow of the session keeps the next run away.
            let data = unsafe { std::slice::from_raw_parts(place.aligned.cast::<f32>(), place.size as usize) };
            Ok(Named { name: &output.name, shape, data })
        });
        Ok(Outputs { list: list.collect::<Result<_, _>>()? })
    }

    /// Where a buffer's elements lie.
    fn locate(
        &self,
        id: BufferId,
        sizes: &Sizes,
        layout: &Layout,
        inputs: &HashMap<BufferId, Descriptor>,
    ) -> Result<Descriptor, RunError> {
        let manifest = &self.program.manifest;
        let buffer = &manifest.buffers[id];
        let elements = buffer.elements(sizes) as usize;
        let lost = || RunError::Manifest(format!("buffer {id} has no memory"));
        let part = |floats: &[f32], pointer: *mut f32, start: usize| {
            let fits = start.checked_add(elements).is_some_and(|end| end <= floats.len());
            // In bounds, so the pointer stays within its block.
            fits.then(|| Descriptor::new(pointer.wrapping_add(start).cast(), elements)).ok_or_else(lost)
        };
        let flat = |floats: &Floats, start| part(floats, floats.pointer(), start);
        match &buffer.storage {
            Storage::Input(_) => inputs.get(&id).copied().ok_or_else(lost),
            Storage::Tensor { index, rows } => {
                let tensor = &manifest.tensors[*index];
                let row = tensor.shape.iter().skip(1).product::<u64>() as usize;
                let start = rows.map_or(0, |(start, _)| start);
                match tensor.trainable {
                    Some((first, last)) if (first..last).contains(&start) || first == last && elements == 0 => {
                        let span = self.spans[*index].as_ref().ok_or_else(lost)?;
                        flat(&self.flat.values, span.start + (start.saturating_sub(first)) as usize * row)
                    }
                    _ => {
                        let data = self.frozen[*index].as_ref().ok_or_else(lost)?.as_slice();
                        // Frozen: kernels read it and nothing else.
                        part(data, data.as_ptr().cast_mut(), start as usize * row)
                    }
                }
            }
            Storage::Gradient { index } => {
                flat(&self.flat.gradients, self.spans[*index].as_ref().ok_or_else(lost)?.start)
            }
            Storage::Flat(name) => match name.as_str() {
                "values" => flat(&self.flat.values, 0),
                "gradients" => flat(&self.flat.gradients, 0),
                "m" => flat(&self.flat.m, 0),
                "v" => flat(&self.flat.v, 0),
                _ => flat(&self.flat.decay, 0),
            },
            Storage::Prepared => flat(self.prepared.get(&id).ok_or_else(lost)?, 0),
            Storage::Temporary => flat(&self.arena, layout.offset(id).ok_or_else(lost)?),
        }
    }

    fn grow_arena(&mut self, layout: &Layout) -> Result<(), RunError> {
        if layout.elements() > self.arena.len() {
            // The old one goes first: both together may be too much.
            self.arena = Floats::default();
            self.arena = memory("intermediate results", layout.elements() as u64)?;
        }
        Ok(())
    }

    fn note_peak(&mut self) {
        let Flat { values, gradients, m, v, decay } = &self.flat;
        let flat = [values, gradients, m, v, decay].into_iter();
        let owned: u64 = flat.chain(self.prepared.values()).chain([&self.arena]).map(Floats::bytes).sum();
        let frozen: u64 = self.frozen.iter().flatten().map(|data| data.as_slice().len() as u64 * 4).sum();
        self.peak = self.peak.max(owned + frozen);
    }
}

type Table = HashMap<BufferId, Descriptor>;

/// Runs one launch to its end. To be called within the pool.
fn execute(program: &Program, pool: &Pool, launch: &Launch, table: &Table, sizes: &Sizes) {
    let buffers = launch.buffers.iter().map(|id| table[id]).collect();
    let extents = launch.extents.iter().map(|e| e.eval(sizes) as i64).collect();
    let call: Call = program.kernels.call(launch.kernel, buffers, extents);
    pool.split(launch.units.eval(sizes), call.elements(), |begin, end| {
        // SAFETY: the table holds live memory of the manifest's sizes, which this session alone owns while
        // it runs; the ranges are disjoint.
        unsafe { call.run(begin, end) }
    });
}

/// Fills a temporary with NaN, so that reading what was never written shows.
fn poison(place: &Descriptor) {
    // SAFETY: a temporary's part of the arena, which nobody reads before its first launch.
    unsafe { std::slice::from_raw_parts_mut(place.aligned.cast::<f32>(), place.size as usize) }.fill(f32::NAN);
}

/// Refuses a batch that lacks what the entry computes on.
fn check_sizes(name: &str, entry: &Entry, manifest: &Manifest, sizes: &Sizes) -> Result<(), BatchError> {
    let needs = |what: &Extent| {
        let has = |e: &Extent| mentions(e, &|part| part == what);
        named(entry).any(|&b| manifest.buffers[b].shape.iter().any(has))
    };
    let nothing = |what| Err(BatchError::Nothing { entry: name.into(), what });
    match sizes {
        Sizes { sequences: 0, .. } if needs(&Extent::Tokens) || needs(&Extent::Sequences) => nothing("sequences"),
        Sizes { targets: 0, .. } if needs(&Extent::Targets) => nothing("`targets`"),
        _ => Ok(()),
    }
}

/// Finds every input the entry names in the batch, in the type and number its buffer has.
fn bind(
    name: &str,
    entry: &Entry,
    manifest: &Manifest,
    sizes: &Sizes,
    batch: &Batch,
    integers: &BTreeMap<&str, std::borrow::Cow<'_, [i32]>>,
) -> Result<HashMap<BufferId, Descriptor>, BatchError> {
    let mut bound = HashMap::new();
    for &id in named(entry) {
        let buffer = &manifest.buffers[id];
        let Storage::Input(input) = &buffer.storage else { continue };
        let (data, found): (*const c_void, usize) = match buffer.element {
            Element::I32 => match integers.get(input.as_str()) {
                Some(values) => (values.as_ptr().cast(), values.len()),
                None => return Err(BatchError::Missing { entry: name.into(), name: input.clone() }),
            },
            Element::F32 => match batch.floats.get(input) {
                Some(values) => (values.as_ptr().cast(), values.len()),
                None => return Err(BatchError::Missing { entry: name.into(), name: input.clone() }),
            },
        };
        let expected = buffer.elements(sizes);
        if found as u64 != expected {
            let (found, name) = (found as u64, input.clone());
            let Sizes { tokens, sequences, targets, .. } = sizes;
            let why = format!("the batch has {tokens} tokens in {sequences} sequences and {targets} targets");
            return Err(BatchError::Count { name, found, expected, why });
        }
        // Kernels only read inputs.
        bound.insert(id, Descriptor::new(data.cast_mut(), found));
    }
    Ok(bound)
}

/// A result by name: row-major, ragged ones flat.
#[derive(Clone, Debug, PartialEq)]
pub struct Named<'s> {
    pub name: &'s str,
    pub shape: Vec<u64>,
    pub data: &'s [f32],
}

/// The results of a run, in the session's memory until the next one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs<'s> {
    list: Vec<Named<'s>>,
}

impl<'s> Outputs<'s> {
    pub fn get(&self, name: &str) -> Option<&Named<'s>> {
        self.list.iter().find(|o| o.name == name)
    }

    /// The single number called `name`: `loss`, `grad_norm`.
    pub fn scalar(&self, name: &str) -> Option<f32> {
        self.get(name).filter(|o| o.data.len() == 1).map(|o| o.data[0])
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Named<'s>> {
        self.list.iter()
    }
}

// What a caller asks and sets.
impl Session {
    pub fn program(&self) -> &Arc<Program> {
        &self.program
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    pub fn flat(&self) -> &Flat {
        &self.flat
    }

    pub fn flat_mut(&mut self) -> &mut Flat {
        &mut self.flat
    }

    /// The trainable values of a tensor (its trainable rows) in each of the flat vectors.
    pub fn span(&self, name: &str) -> Option<Range<usize>> {
        let index = self.program.manifest.tensors.iter().position(|t| t.name == name)?;
        self.spans[index].clone()
    }

    /// A tensor's gradient in the tensor's shape; rows that do not train have 0.
    pub fn gradient(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.program.manifest.tensors.iter().find(|t| t.name == name)?;
        let (span, (start, _)) = (self.span(name)?, tensor.trainable?);
        let row = tensor.shape.iter().skip(1).product::<u64>() as usize;
        let mut full = vec![0.0; tensor.shape.iter().product::<u64>() as usize];
        full[start as usize * row..][..span.len()].copy_from_slice(&self.flat.gradients[span]);
        Some(full)
    }

    /// The most memory held so far: weights, optimizer state and intermediate results, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.peak
    }

    /// Fills temporaries with NaN before their first use from now on: for tests.
    pub fn set_poison(&mut self, poison: bool) {
        self.poison = poison;
    }

    /// Starts to collect the time each operation takes, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(BTreeMap::new());
    }

    /// By operation, what was spent since [`Session::start_profile`].
    pub fn profile(&self) -> Option<&BTreeMap<String, Spent>> {
        self.profile.as_ref()
    }
}

#[cfg(test)]
mod tests;
