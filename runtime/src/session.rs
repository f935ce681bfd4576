//! Runs an artifact's entries: binds buffers to memory and hands the launches to a backend.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use peft_grammar::names::{Entry, Input, Vector};

use crate::arena::{self, Plan};
use crate::artifact::{Buffer, BufferId, Element, Launch, Limit, Manifest, Output, Sizes, Storage};
use crate::backend::{Backend, Job, Kept, Place, Profile, Words};
use crate::cpu::{Cpu, Library};
use crate::cuda::Cuda;
use crate::error::{BatchPlace, Beyond, RuntimeError};
use crate::memory::{LINE, Numbers, release};
use crate::trust::{TrustError, What, trusted};
use crate::validate::validate;

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
    /// Loads the library or the PTX at `path` with the kernels that `manifest` names, if no stranger can have written it.
    pub fn new(manifest: Manifest, path: &Path) -> Result<Self, RuntimeError> {
        validate(&manifest).map_err(|why| RuntimeError::artifact(path, why))?;
        let path = &trusted(path, What::Artifact).map_err(|error| match error {
            TrustError::Stranger(stranger) => RuntimeError::Stranger(stranger),
            TrustError::Unreadable(error) => RuntimeError::artifact(path, error),
        })?;
        let code = match manifest.gpu() {
            Some(_) => Code::Ptx(std::fs::read_to_string(path).map_err(|e| RuntimeError::artifact(path, e))?),
            None => Code::Library(Library::load(path, &manifest.kernels)?),
        };
        Ok(Program { manifest, code })
    }

    /// The program that runs these entries alone: weights are packed for what they read, and for nothing else.
    pub fn only(mut self, entries: &[&str]) -> Self {
        let Manifest { entries: known, prepare, buffers, .. } = &mut self.manifest;
        known.retain(|name, _| entries.contains(&name.as_str()));
        let runs = known.values().flat_map(|e| &e.launches).flat_map(|l| &l.buffers);
        let outputs = known.values().flat_map(|e| &e.outputs).map(|o| &o.buffer);
        let mut read: BTreeSet<BufferId> = runs.chain(outputs).copied().collect();
        // What prepares for what prepares comes before it.
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

/// What a run is given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs {
    /// Tokens of each sequence.
    pub lengths: Vec<i32>,
    /// `ids`, `labels`, `rng`, …
    pub ints: BTreeMap<String, Vec<i32>>,
    /// `hyper`, `shares`.
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
            targets: self.ints.get(Input::Targets.name()).map_or(0, |t| t.len() as u64),
            pairs,
            values: values as u64,
        })
    }

    /// Checks every integer that indexes something against what the manifest says of it.
    pub fn check(&self, limits: &[Limit], sizes: &Sizes) -> Result<(), RuntimeError> {
        for limit in limits {
            let Some(values) = self.ints.get(&limit.input) else { continue };
            let below = limit.below.eval(sizes);
            let most = below.min(1 << 31) as u32;
            let except = limit.except.and_then(|x| u32::try_from(x).ok()).unwrap_or(u32::MAX);
            // As an unsigned number a negative one is beyond all of them.
            let fits = |x: i32| (x as u32) < most && x as u32 != except;
            // Two passes: the first, which nearly always is the only one, has no early end and goes by whole vectors.
            if values.iter().fold(true, |fit, &x| fit & fits(x)) {
                continue;
            }
            let at = values.iter().position(|&x| !fits(x)).unwrap_or_default();
            let place = self.place(&limit.input, at);
            return Err(Beyond { at, value: values[at], place, below, limit: limit.clone() }.into());
        }
        Ok(())
    }

    /// Where value `at` of an input belongs.
    fn place(&self, input: &str, at: usize) -> BatchPlace {
        let target = |at: usize| self.ints.get(Input::Targets.name()).and_then(|t| t.get(at)).map(|&t| t as usize);
        let token = match Input::of(input) {
            Some(Input::Ids | Input::Types | Input::Positions) => Some(at),
            Some(Input::Targets | Input::Labels) => target(at),
            _ => None,
        };
        let Some(token) = token else { return BatchPlace { sequence: at, token: None } };
        let mut start = 0;
        for (sequence, &length) in self.lengths.iter().enumerate() {
            let end = start + length as usize;
            if token < end {
                return BatchPlace { sequence, token: Some(token - start) };
            }
            start = end;
        }
        BatchPlace { sequence: self.lengths.len(), token: None }
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
        let derived = [(Input::Offsets, offsets), (Input::Segments, segments), (Input::Pairs, pairs)];
        derived.map(|(input, x)| (input.name(), x)).into()
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
    /// By entries, and the largest sizes it serves.
    plans: BTreeMap<Vec<String>, (Sizes, Arc<Plan>)>,
    staged: Option<Staged>,
    last: Option<Run>,
    peak: u64,
}

/// What is to be run next: entries, one after the other, on a batch that is on its way.
struct Staged {
    entries: Vec<String>,
    sizes: Sizes,
}

/// What [`Session::promise`] has promised.
#[derive(Debug)]
pub struct Promise(Kept);

/// The last run, and where its temporaries lie.
struct Run {
    entries: Vec<String>,
    sizes: Sizes,
    plan: Arc<Plan>,
}

/// Where everything lies.
struct Home {
    /// Frozen tensors (and frozen rows' whole tensors) that a launch still reads.
    tensors: Vec<Option<Place>>,
    /// Where each tensor's trainable values begin in the flat vectors.
    places: Vec<usize>,
    flats: BTreeMap<Vector, Place>,
    prepared: HashMap<BufferId, Place>,
    arena: Place,
    /// What was given for the last run, and for the one to come.
    given: [Given; 2],
    /// The last run's.
    turn: usize,
}

/// A batch, all of it in one block: where each input begins, and how long it is.
struct Given {
    place: Place,
    at: BTreeMap<String, (usize, usize)>,
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
        // The compiler has been here, perhaps, and does not come back.
        release();
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
        let always = [Vector::Values, Vector::Gradients, Vector::Decay];
        for &vector in Vector::ALL.iter().filter(|vector| always.contains(vector) || moves(&manifest, **vector)) {
            flats.insert(vector, whole(backend.as_mut(), count)?);
        }
        for (i, (tensor, data)) in tensors.iter().zip(&weights).enumerate() {
            let Some((start, _)) = tensor.trainable else { continue };
            let (from, length) = ((start * tensor.row()) as usize, tensor.trainable_elements() as usize);
            backend.write(flats[&Vector::Values].block, places[i], Words::Floats(&data[from..from + length]))?;
            if tensor.decay {
                backend.write(flats[&Vector::Decay].block, places[i], Words::Floats(&vec![1.0; length]))?;
            }
            if let Some(factors) = flats.get(&Vector::LrFactors) {
                let factors_of_tensor = vec![tensor.lr_factor.unwrap_or(1.0) as f32; length];
                backend.write(factors.block, places[i], Words::Floats(&factors_of_tensor))?;
            }
        }
        // Tensors that train as a whole live in the flat vector alone.
        let frozen = tensors.iter().zip(weights);
        let frozen = frozen.map(|(t, data)| (t.trainable_elements() < data.len() as u64).then_some(data)).collect();
        let arena = whole(backend.as_mut(), 0)?;
        let mut given = || Ok::<_, RuntimeError>(Given { place: whole(backend.as_mut(), 0)?, at: BTreeMap::new() });
        let given = [given()?, given()?];
        let (tensors, prepared) = (vec![None; tensors.len()], HashMap::new());
        let home = Home { tensors, places, flats, prepared, arena, given, turn: 0 };
        let (plans, poison, profile) = (BTreeMap::new(), false, None);
        let mut session =
            Session { manifest, backend, home, poison, profile, plans, staged: None, last: None, peak: 0 };
        session.prepare(frozen)?;
        Ok(session)
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Packs frozen weights. One comes to the backend when it is read for the first time, and what only this reads goes
    /// as soon as it was read for the last time: at no time are all there in both forms.
    fn prepare(&mut self, mut frozen: Vec<Option<Numbers>>) -> Result<(), RuntimeError> {
        let Session { manifest, backend, home, .. } = self;
        let launches = &manifest.prepare;
        let sizes = Sizes { values: home.values() as u64, ..Sizes::default() };
        let (buffers, tensors) = last_reads(manifest, launches);
        let plan = arena::plan(manifest, launches, &[], &sizes);
        home.grow_arena(backend.as_mut(), plan.size)?;
        for (at, launch) in launches.iter().enumerate() {
            for &id in &launch.buffers {
                let buffer = &manifest.buffers[id];
                match buffer.storage {
                    Storage::Prepared if !home.prepared.contains_key(&id) => {
                        home.prepared.insert(id, whole(backend.as_mut(), buffer.elements(&sizes) as usize)?);
                    }
                    Storage::Tensor { index, .. } => home.settle(backend.as_mut(), index, &mut frozen)?,
                    _ => {}
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
        for (index, _) in tensors.iter().enumerate().filter(|(_, last)| **last == Some(usize::MAX)) {
            home.settle(backend.as_mut(), index, &mut frozen)?;
        }
        self.peak = self.peak.max(backend.held());
        backend.wait()
    }

    /// Runs an entry. Its outputs stay until the next run.
    pub fn run(&mut self, entry: &str, inputs: &Inputs) -> Result<(), RuntimeError> {
        self.stage(&[entry], inputs)?;
        self.start()?;
        self.wait()
    }

    /// Checks what entries are to run on, one after the other, and sends it on its way. What runs now goes on.
    pub fn stage(&mut self, entries: &[&str], inputs: &Inputs) -> Result<(), RuntimeError> {
        let Session { manifest, backend, home, .. } = self;
        if let Some(entry) = entries.iter().find(|entry| !manifest.entries.contains_key(**entry)) {
            let known = manifest.entries.keys().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::Entry { entry: entry.to_string(), known });
        }
        let entries: Vec<String> = entries.iter().map(|entry| entry.to_string()).collect();
        let sizes = inputs.sizes(home.values())?;
        inputs.check(&manifest.limits, &sizes)?;
        home.give(backend.as_mut(), manifest, &entries, &sizes, inputs)?;
        self.staged = Some(Staged { entries, sizes });
        Ok(())
    }

    /// Starts what was staged. It has ended when [`Session::wait`] returns, or an output has been read.
    pub fn start(&mut self) -> Result<(), RuntimeError> {
        let Staged { entries, sizes } = self.staged.take().expect("a batch is staged");
        self.last = None;
        let plan = self.plan(&entries, &sizes)?;
        let Session { manifest, backend, home, .. } = self;
        home.turn ^= 1;
        let mut jobs = vec![];
        let mut poisoned = vec![];
        for (launch, born) in launches(manifest, &entries).zip(&plan.born) {
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
        self.last = Some(Run { entries, sizes, plan });
        Ok(())
    }

    /// A run may be started, of what is staged, before the one before it has ended.
    pub fn overlaps(&self) -> bool {
        self.backend.overlaps() && self.profile.is_none()
    }

    /// The first number of each of these outputs of the run started last, for when it has ended: another may be started
    /// until then.
    pub fn promise(&mut self, names: &[&str]) -> Result<Promise, RuntimeError> {
        let Run { entries, sizes, plan } = self.last.as_ref().expect("a run has been started");
        let place = |name: &&str| {
            let output = outputs(&self.manifest, entries).find(|o| o.name == *name);
            let output = output.ok_or_else(|| RuntimeError::input(*name, "is no output of this artifact"))?;
            let place = self.home.locate(&self.manifest, output.buffer, sizes, plan)?;
            Ok(Place { length: place.length.min(1), ..place })
        };
        let places = names.iter().map(place).collect::<Result<Vec<_>, RuntimeError>>()?;
        Ok(Promise(self.backend.keep(&places)?))
    }

    /// Waits until the run has ended.
    pub fn redeem(&mut self, Promise(kept): Promise) -> Result<Vec<f32>, RuntimeError> {
        self.backend.kept(kept)
    }

    /// Until what was started has ended.
    pub fn wait(&mut self) -> Result<(), RuntimeError> {
        self.backend.wait()
    }

    /// Where temporaries lie, with room for them. A plan serves every batch that is larger in nothing, so that after a
    /// few batches none is made any more, and launches find their buffers where they were.
    fn plan(&mut self, entries: &[String], sizes: &Sizes) -> Result<Arc<Plan>, RuntimeError> {
        let Session { manifest, backend, home, plans, .. } = self;
        let known = plans.get(entries);
        if let Some((most, plan)) = known
            && *most == most.max(*sizes)
        {
            home.grow_arena(backend.as_mut(), plan.size)?;
            return Ok(plan.clone());
        }
        let launches: Vec<Launch> = launches(manifest, entries).cloned().collect();
        let outputs: Vec<Output> = outputs(manifest, entries).cloned().collect();
        let mut planned = |of: Sizes| {
            let plan = arena::plan(manifest, &launches, &outputs, &of);
            home.grow_arena(backend.as_mut(), plan.size).map(|()| (of, Arc::new(plan)))
        };
        let roomy = known.map_or(*sizes, |(most, _)| most.max(*sizes));
        // Where no room is for what no batch had together, there may be for this one.
        let (of, plan) = planned(roomy)
            .or_else(|_| planned(*sizes))
            .map_err(|error| advised(error, sizes, |part| arena::plan(manifest, &launches, &outputs, part).size))?;
        plans.insert(entries.to_vec(), (of, plan.clone()));
        Ok(plan)
    }

    /// Gives weights that start from a value of others that value: the entry `init` computes it.
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

    /// Shape and content of an output of the last run.
    pub fn output(&self, name: &str) -> Option<(Vec<u64>, Cow<'_, [f32]>)> {
        let Run { entries, sizes, plan } = self.last.as_ref()?;
        let output = outputs(&self.manifest, entries).find(|o| o.name == name)?;
        let shape: Vec<u64> = output.shape.iter().map(|e| e.eval(sizes)).collect();
        let length = shape.iter().product::<u64>() as usize;
        let place = self.home.locate(&self.manifest, output.buffer, sizes, plan).ok()?;
        let place = (length <= place.length).then_some(Place { length, ..place })?;
        Some((shape, self.backend.read(place).ok()?))
    }

    /// Names of the last run's outputs.
    pub fn outputs(&self) -> Vec<String> {
        let entries = self.last.as_ref().map_or(&[][..], |run| &run.entries);
        outputs(&self.manifest, entries).map(|o| o.name.clone()).collect()
    }

    /// How many values train.
    pub fn trainable(&self) -> usize {
        self.home.values()
    }

    /// What steps change: `values`, the moments that the optimizer has, and the averages if there are some.
    pub fn optimized(&self) -> Vec<Vector> {
        Vector::CHANGED.into_iter().filter(|vector| self.home.flats.contains_key(vector)).collect()
    }

    /// One of the optimizer's vectors, which the artifact has.
    pub fn flat(&self, vector: Vector) -> Result<Cow<'_, [f32]>, RuntimeError> {
        self.backend.read(self.home.flats[&vector])
    }

    /// Gives one of them other numbers, as many as it has.
    pub fn set_flat(&mut self, vector: Vector, numbers: &[f32]) -> Result<(), RuntimeError> {
        let place = self.home.flats[&vector];
        assert_eq!(numbers.len(), place.length, "all of `{vector}`");
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
        Place { start: self.home.places[index], length, ..self.home.flats[&Vector::Values] }
    }

    /// The most memory weights, packed weights, optimizer and temporaries took at once, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.peak
    }
}

/// A launch of an entry names this flat vector.
fn moves(manifest: &Manifest, vector: Vector) -> bool {
    let launches = manifest.entries.values().flat_map(|entry| &entry.launches);
    launches.flat_map(|launch| &launch.buffers).any(|&id| manifest.buffers[id].storage == Storage::Flat(vector))
}

/// A block of its own.
fn whole(backend: &mut dyn Backend, length: usize) -> Result<Place, RuntimeError> {
    Ok(Place { block: backend.alloc(length)?, start: 0, length })
}

/// Of entries that run one after the other.
fn launches<'a>(manifest: &'a Manifest, entries: &'a [String]) -> impl Iterator<Item = &'a Launch> {
    entries.iter().flat_map(move |entry| &manifest.entries[entry].launches)
}

fn outputs<'a>(manifest: &'a Manifest, entries: &'a [String]) -> impl Iterator<Item = &'a Output> {
    entries.iter().flat_map(move |entry| &manifest.entries[entry].outputs)
}

/// The error with how much of the batch there is room for, where it is known how many bytes there are. `numbers`: how
/// many temporaries are, of a batch of these sizes.
fn advised(error: RuntimeError, sizes: &Sizes, numbers: impl Fn(&Sizes) -> usize) -> RuntimeError {
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
    let mend = match fit {
        0 => format!("the batch has {tokens} tokens in {sequences} sequences, and no part of it would fit"),
        _ => format!(
            "of the batch's {sequences} sequences with {tokens} tokens, {fit} with {} would fit: \
             `--set train.batch={fit}`, and `train.accumulate` makes one step of several batches",
            part(fit).tokens
        ),
    };
    RuntimeError::Memory { wanted, free: Some(free), why: why.clone(), mend }
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
        // Rows that train lie elsewhere.
        if let Storage::Tensor { index, rows } = manifest.buffers[id].storage
            && !manifest.tensors[index].trains(rows)
        {
            tensors[index] = Some(at);
        }
    }
    (buffers, tensors)
}

impl Home {
    /// How many values train.
    fn values(&self) -> usize {
        self.flats[&Vector::Values].length
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

    /// Brings a frozen tensor that is not there yet.
    fn settle(
        &mut self,
        backend: &mut dyn Backend,
        index: usize,
        frozen: &mut [Option<Numbers>],
    ) -> Result<(), RuntimeError> {
        if let Some(numbers) = frozen[index].take() {
            let length = numbers.len();
            self.tensors[index] = Some(Place { block: backend.take(numbers)?, start: 0, length });
        }
        Ok(())
    }

    /// Sends what was given to where the launches of the next run read it; checks that it has the size they want.
    fn give(
        &mut self,
        backend: &mut dyn Backend,
        manifest: &Manifest,
        entries: &[String],
        sizes: &Sizes,
        inputs: &Inputs,
    ) -> Result<(), RuntimeError> {
        let derived = inputs.derived();
        let Given { place, at } = &mut self.given[self.turn ^ 1];
        at.clear();
        let mut all: Vec<i32> = vec![];
        for &id in launches(manifest, entries).flat_map(|l| &l.buffers) {
            let buffer = &manifest.buffers[id];
            let Storage::Input(name) = &buffer.storage else { continue };
            if at.contains_key(name) {
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
            at.insert(name.clone(), (all.len(), found));
            match words {
                Words::Ints(x) => all.extend(x),
                Words::Floats(x) => all.extend(x.iter().map(|x| x.to_bits() as i32)),
            }
            all.resize(all.len().next_multiple_of(LINE), 0);
        }
        if place.length < all.len() {
            backend.free(place.block);
            place.length = 0;
            *place = whole(backend, all.len())?;
        }
        backend.send(place.block, Words::Ints(&all))
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
            Storage::Input(name) => {
                let Given { place, at } = &self.given[self.turn];
                let &(start, found) = at.get(name).ok_or_else(outside)?;
                (Place { length: start + found, ..*place }, start)
            }
            Storage::Tensor { index, rows } => {
                let tensor = &manifest.tensors[*index];
                let start = rows.map_or(0, |(start, _)| start);
                match tensor.trainable {
                    Some((first, _)) if tensor.trains(*rows) => {
                        (self.flats[&Vector::Values], self.places[*index] + ((start - first) * tensor.row()) as usize)
                    }
                    _ => {
                        let missing = || RuntimeError::input(&tensor.name, "its values are gone");
                        (self.tensors[*index].ok_or_else(missing)?, (start * tensor.row()) as usize)
                    }
                }
            }
            Storage::Gradient { index } => (self.flats[&Vector::Gradients], self.places[*index]),
            Storage::Flat(vector) => match self.flats.get(vector) {
                Some(flat) => (*flat, 0),
                None => return Err(RuntimeError::input(vector.name(), "is no vector of the optimizer")),
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
