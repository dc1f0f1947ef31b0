//! The engine on a thread of its own, for concurrent callers.
//!
//! Callers send commands through a channel; the events of a request go to the sink that came with it.
//! A sink is called on the engine's thread and must not block: hand the event on and return. A panic in a
//! step ends the requests that cause it; if it is not theirs, the thread ends and [`Status::failure`] says so.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Sender, bounded, unbounded};
use kernels::Dtype;
use parking_lot::Mutex;
use scheduler::WeightsVersion;

use crate::config::EngineConfig;
use crate::engine::{Engine, check_replacement};
use crate::error::{Error, Result};
use crate::guess::SpeculationStats;
use crate::guests::{Command, Guests};
use crate::memory::MemoryPlan;
use crate::model::{GenerationDefaults, ModelConfig, ModelSource};
use crate::pause::PauseMode;
use crate::request::{Event, Request, RequestId};
use crate::text::{ChatTemplate, Tokenizer};
use crate::timings::Timings;

/// Whether a sink's owner still listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It does.
    Ok,
    /// It has left: the request is aborted.
    Gone,
}

/// Takes the events of one request.
pub type Sink = Box<dyn FnMut(Event) -> Sent + Send>;

/// Hears whether requests have been taken in, and the names they run by.
pub type TakenIn = Box<dyn FnOnce(Result<Vec<RequestId>>) -> Sent + Send>;

/// Called when the events of a step have gone to their sinks, for owners of sinks who hand them on together.
pub type AfterEvents = Box<dyn FnMut() -> Sent + Send>;

/// What whoever drives the engine is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It runs steps, or waits for requests.
    Serving,
    /// It drives an [attached](Service::attach) engine and is at other work, a weights update for
    /// example: requests wait, however long it takes.
    Away,
}

/// What the engine's thread is doing.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Blocks, cache hits and preemptions.
    pub stats: scheduler::Stats,
    /// Tokens generated since start.
    pub generated_tokens: u64,
    /// The weights in use.
    pub version: WeightsVersion,
    /// How requests are held back, if they are; it may not be reached yet.
    pub pause: Option<PauseMode>,
    /// Samples that ended with an error because their logits were not finite numbers.
    pub nan_logits: u64,
    /// Guesses of what samples draw next.
    pub speculation: SpeculationStats,
    /// Whether steps are to be expected.
    pub phase: Phase,
    /// When the last step, or look for work, ended; or when steps began again after the driver was
    /// [away](Phase::Away).
    pub heartbeat: Instant,
    /// Set when the engine has failed and its thread ended: why.
    pub failure: Option<String>,
}

impl Status {
    /// Share of the KV blocks in use, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        self.stats.used_blocks as f64 / self.stats.total_blocks.max(1) as f64
    }
}

/// An engine that many threads can use at once.
pub struct Service {
    commands: Sender<Command>,
    status: Arc<Mutex<Status>>,
    timings: Arc<Mutex<Timings>>,
    thread: Option<JoinHandle<Engine>>,
    facts: Facts,
}

/// What callers want to know without asking the thread.
struct Facts {
    model: ModelConfig,
    tokenizer: Option<Arc<Tokenizer>>,
    chat_template: Option<Arc<ChatTemplate>>,
    defaults: GenerationDefaults,
    eos: Vec<u32>,
    plan: MemoryPlan,
    config: EngineConfig,
    dtype: Dtype,
    /// Why its weights cannot be replaced, if they cannot.
    fixed: Option<String>,
}

impl Service {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(engine: Engine) -> Result<Self> {
        let (mut service, guests) = Self::attach(&engine);
        service.status.lock().phase = Phase::Serving;
        let worker = Worker { engine, guests };
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || worker.run())
            .map_err(|e| Error::internal(format!("no thread for the engine: {e}")))?;
        service.thread = Some(thread);
        Ok(service)
    }

    /// A service over an engine that its owner goes on driving: requests are carried out when the owner
    /// steps the [`Guests`], and fail once they are dropped. No thread is started.
    pub fn attach(engine: &Engine) -> (Self, Guests) {
        let facts = Facts {
            model: engine.model().clone(),
            tokenizer: engine.tokenizer().cloned(),
            chat_template: engine.chat_template().cloned(),
            defaults: engine.generation_defaults().clone(),
            eos: engine.eos().to_vec(),
            plan: engine.memory_plan().clone(),
            config: engine.config().clone(),
            dtype: engine.dtype(),
            fixed: engine.check_in_full().err().map(|error| error.to_string()),
        };
        let status = Arc::new(Mutex::new(Status {
            running: 0,
            waiting: 0,
            stats: engine.stats(),
            generated_tokens: 0,
            version: engine.version(),
            nan_logits: engine.nan_logits(),
            speculation: engine.speculation(),
            phase: Phase::Away,
            pause: None,
            heartbeat: Instant::now(),
            failure: None,
        }));
        let (commands, receiver) = unbounded();
        let timings = Arc::new(Mutex::new(Timings::new()));
        let guests = Guests::new(receiver, Arc::clone(&status), Arc::clone(&timings));
        (Self { commands, status, timings, thread: None, facts }, guests)
    }

    /// Takes in a request; `sink` gets all its events.
    ///
    /// # Errors
    /// What [`Engine::add`] says of the request, or that the engine has stopped.
    pub fn submit(&self, request: Request, sink: Sink) -> Result<RequestId> {
        let ids = self.submit_all(vec![(request, sink)])?;
        ids.into_iter().next().ok_or_else(|| Error::internal("the engine has taken in nothing"))
    }

    /// Takes in several requests at once: all of them before the next step, or none. The sinks of those
    /// before one that is refused get the ends of their samples.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), for the first that is refused.
    pub fn submit_all(&self, requests: Vec<(Request, Sink)>) -> Result<Vec<RequestId>> {
        let (reply, answer) = bounded(1);
        self.submit_all_then(
            requests,
            Box::new(move |taken| {
                // The channel has room for it, and its other end is below.
                let _left = reply.send(taken);
                Sent::Ok
            }),
        );
        answer.recv().map_err(|_| stopped())?
    }

    /// As [`submit_all`](Self::submit_all), without waiting, which can take as long as an
    /// [attached](Self::attach) engine is [away](Phase::Away): `taken` is called on the engine's thread and, as
    /// a sink, must not block; when it says [`Sent::Gone`] the requests are aborted. It is dropped uncalled when
    /// the engine has stopped.
    pub fn submit_all_then(&self, requests: Vec<(Request, Sink)>, taken: TakenIn) {
        let asked = Instant::now();
        // Not sent, it is dropped.
        let _stopped = self.commands.send(Command::Submit { requests, taken, asked });
    }

    /// Has `call` called on the engine's thread whenever sinks have had events, after the last of them; as a
    /// sink, it must not block. It is dropped when it says [`Sent::Gone`], and with the engine's thread or
    /// [`Guests`]: what sinks got and it was not called for may be handed on then. Reaches the engine
    /// before requests that are submitted later.
    pub fn after_events(&self, call: AfterEvents) {
        // A stopped engine has no events.
        let _stopped = self.commands.send(Command::AfterEvents(call));
    }

    /// Ends a request; its sink gets the ends of its samples. Nothing happens if it is over.
    pub fn abort(&self, id: RequestId) {
        // A stopped engine has nothing left to abort.
        let _stopped = self.commands.send(Command::Abort(id));
    }

    /// Holds all requests that are still to come, and those on their way as `mode` says; returns when that is
    /// reached. A service that pauses already goes over to `mode`.
    ///
    /// # Errors
    /// `ErrorKind::Busy` when another pause or a resume came first, and when somebody else drives the
    /// engine ([`attach`](Self::attach)); `ErrorKind::Internal` when the engine has stopped.
    pub fn pause(&self, mode: PauseMode) -> Result<()> {
        self.check_own()?;
        self.ask(|reply| Command::Pause { mode, reply })
    }

    /// Ends a pause; nothing happens without one.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn resume(&self) -> Result<()> {
        self.check_own()?;
        self.ask(|reply| Command::Resume { reply })
    }

    /// Checks that [`replace_weights`](Self::replace_weights) can take `source`, beside the requests that
    /// run. Reads the whole of it.
    ///
    /// # Errors
    /// `ErrorKind::Model`, naming the first tensor or setting that is not that of this model;
    /// `ErrorKind::Unsupported` when weights were left quantised; `ErrorKind::Busy` as [`pause`](Self::pause).
    pub fn check_weights(&self, source: &ModelSource) -> Result<()> {
        self.check_own()?;
        match &self.facts.fixed {
            Some(why) => Err(Error::unsupported(why.clone())),
            None => check_replacement(&self.facts.model, source),
        }
    }

    /// Overwrites the weights by those of `source`, once it is [checked](Self::check_weights). Requests wait
    /// and go on with the new weights, which compute anew what they read.
    ///
    /// # Errors
    /// As [`Engine::replace_weights`] and [`pause`](Self::pause). After `ErrorKind::Internal` the service
    /// has failed.
    pub fn replace_weights(&self, source: ModelSource) -> Result<WeightsVersion> {
        self.check_own()?;
        self.ask(|reply| Command::Replace { source: Box::new(source), reply })
    }

    /// Has a command carried out, and waits for the answer.
    fn ask<T>(&self, command: impl FnOnce(Sender<Result<T>>) -> Command) -> Result<T> {
        let (reply, answer) = bounded(1);
        self.commands.send(command(reply)).map_err(|_| stopped())?;
        answer.recv().map_err(|_| stopped())?
    }

    /// Refuses where somebody else drives the engine.
    fn check_own(&self) -> Result<()> {
        match &self.thread {
            Some(_) => Ok(()),
            None => Err(Error::busy("the weights are in training: the run alone changes them")),
        }
    }

    /// What the thread is doing.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// How long samples waited and ran, and how large steps were, since the start.
    pub fn timings(&self) -> Timings {
        self.timings.lock().clone()
    }

    /// Aborts what runs, ends the thread and gives the engine back.
    ///
    /// # Errors
    /// When the engine has failed: what it holds is not to be relied on. When it is not this service's to
    /// give: it was [attached](Self::attach).
    pub fn stop(mut self) -> Result<Engine> {
        let _stopped = self.commands.send(Command::Stop);
        let Some(thread) = self.thread.take() else {
            return Err(Error::internal("the engine belongs to whoever drives it"));
        };
        let engine = thread.join().map_err(|_| Error::internal(PANICKED))?;
        match self.status().failure {
            None => Ok(engine),
            Some(failure) => Err(Error::internal(failure)),
        }
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        &self.facts.model
    }

    /// The tokenizer, if the model came with one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.facts.tokenizer.as_ref()
    }

    /// The chat template, if the model came with one.
    pub fn chat_template(&self) -> Option<&Arc<ChatTemplate>> {
        self.facts.chat_template.as_ref()
    }

    /// The sampling settings that the model's makers suggest.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.facts.defaults
    }

    /// Tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.facts.eos
    }

    /// Longest sequence, prompt and output together, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.facts.plan.max_model_len
    }

    /// What was reserved.
    pub fn memory_plan(&self) -> &MemoryPlan {
        &self.facts.plan
    }

    /// How the engine was set up.
    pub fn config(&self) -> &EngineConfig {
        &self.facts.config
    }

    /// Format of weights, products and KV cache.
    pub fn dtype(&self) -> Dtype {
        self.facts.dtype
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _stopped = self.commands.send(Command::Stop);
            // A panic of the thread has been reported by its own message.
            let _ended = thread.join();
        }
    }
}

fn stopped() -> Error {
    Error::internal("the engine has stopped")
}

/// An engine and those it runs for.
struct Worker {
    engine: Engine,
    guests: Guests,
}

/// Why the thread has ended, if by a panic that was not contained.
const PANICKED: &str = "the engine's thread panicked";

impl Worker {
    /// Serves until it is told to stop, or the engine fails; then all sinks are dropped.
    fn run(mut self) -> Engine {
        // Steps contain their panics; after one from elsewhere the engine is not used again.
        let served = catch_unwind(AssertUnwindSafe(|| self.guests.linger(&mut self.engine)));
        let outcome = served.unwrap_or_else(|_panic| Err(Error::internal(PANICKED)));
        if let Err(error) = outcome {
            // Said before the sinks go: whoever misses an event can ask why.
            self.guests.fail(&error);
        }
        self.engine
    }
}
