//! The requests of a [`Service`](crate::Service), carried out by whoever drives the engine.
//!
//! [`start`](crate::Service::start) drives an engine for its service alone, on a thread;
//! [`attach`](crate::Service::attach) leaves the
//! engine where it is, with a trainer: [`Host`] is what the trainer works with instead of the bare engine,
//! and the service's requests, its *guests*, share the trainer's batches. A guest's sequence that runs when
//! an update begins gives up its blocks and goes on after it: the new weights compute its tokens so far
//! anew, and each token says which weights drew it. What guests do changes no bit of what the host's own
//! requests get, whose randomness is keyed by their seeds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use parking_lot::Mutex;

use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::model::ModelSource;
use crate::pause::{Gate, PauseMode};
use crate::request::{Event, Request, RequestId};
use crate::service::{AfterEvents, Phase, Sent, Sink, Status, TakenIn};
use crate::timings::{Stopwatch, Timings};
use crate::update::WeightsUpdate;
use scheduler::WeightsVersion;

/// How long an idle engine waits for a request before it shows that it is alive.
const IDLE: Duration = Duration::from_millis(500);

/// What a service asks for.
pub(crate) enum Command {
    Submit { requests: Vec<(Request, Sink)>, taken: TakenIn, asked: Instant },
    AfterEvents(AfterEvents),
    Abort(RequestId),
    Pause { mode: PauseMode, reply: Sender<Result<()>> },
    Resume { reply: Sender<Result<()>> },
    Replace { source: Box<ModelSource>, reply: Sender<Result<WeightsVersion>> },
    Stop,
}

/// Whether more can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Open,
    Closed,
}

/// The requests of one service, wherever they are on their way.
pub struct Guests {
    commands: Receiver<Command>,
    /// Where the events of each request go, and how many of its samples have not ended.
    sinks: HashMap<RequestId, (Sink, usize)>,
    /// Who wants to know that sinks have had the events of a step.
    after: Vec<AfterEvents>,
    status: Arc<Mutex<Status>>,
    watch: Stopwatch,
    gate: Gate,
    /// Why the engine must not be used any more.
    broken: Option<Error>,
}

impl Guests {
    pub(crate) fn new(
        commands: Receiver<Command>,
        status: Arc<Mutex<Status>>,
        timings: Arc<Mutex<Timings>>,
    ) -> Self {
        let (watch, gate) = (Stopwatch::new(timings), Gate::default());
        let (sinks, after) = (HashMap::new(), Vec::new());
        Self { commands, sinks, after, status, watch, gate, broken: None }
    }

    /// Takes in what was asked, runs one batch if there is one, and hands the guests their events; returns
    /// the events of all other requests. Waits for nobody.
    ///
    /// # Errors
    /// As [`Engine::step_contained`].
    pub fn step(&mut self, engine: &mut Engine) -> Result<Vec<Event>> {
        // Nobody may be left to ask; the host goes on.
        let _closed = self.take_commands(engine, Duration::ZERO);
        self.run_batch(engine)
    }

    /// Serves, and nothing else, until the service has gone; then aborts what is left.
    ///
    /// # Errors
    /// As [`Engine::step_contained`].
    pub fn linger(&mut self, engine: &mut Engine) -> Result<()> {
        while self.take_commands(engine, IDLE) == Door::Open {
            self.run_batch(engine)?;
        }
        let open: Vec<RequestId> = self.sinks.keys().copied().collect();
        for id in open {
            engine.abort(id);
        }
        self.run_batch(engine)?;
        Ok(())
    }

    /// Serves for about `time`, or a batch longer.
    fn serve_for(&mut self, engine: &mut Engine, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Ok(());
            }
            let door = self.take_commands(engine, rest);
            if self.has_work(engine) {
                self.run_batch(engine)?;
            } else if door == Door::Closed {
                std::thread::sleep(rest);
            }
        }
    }

    fn run_batch(&mut self, engine: &mut Engine) -> Result<Vec<Event>> {
        self.arrive();
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let others = match self.has_work(engine) {
            true if self.gate.frozen() => {
                let events = engine.take_pending();
                self.deliver(engine, events)
            }
            true => {
                let begun = Instant::now();
                let events = engine.step_contained().inspect_err(|error| self.fail(error))?;
                self.watch.step(begun, &engine.last_batch());
                self.deliver(engine, events)
            }
            false => Vec::new(),
        };
        self.report(engine);
        self.gate.settle(self.sinks.len());
        Ok(others)
    }

    /// Whether running a batch would do something.
    fn has_work(&self, engine: &Engine) -> bool {
        if self.gate.frozen() { engine.has_pending() } else { engine.has_work() }
    }

    /// Carries out what has been asked; an engine without work waits for it, at most `patience`.
    fn take_commands(&mut self, engine: &mut Engine, patience: Duration) -> Door {
        if !self.has_work(engine) && !patience.is_zero() {
            match self.commands.recv_timeout(patience) {
                Ok(command) => {
                    if self.carry_out(engine, command) == Door::Closed {
                        return Door::Closed;
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Door::Open,
                Err(RecvTimeoutError::Disconnected) => return Door::Closed,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if self.carry_out(engine, command) == Door::Closed {
                        return Door::Closed;
                    }
                }
                Err(TryRecvError::Empty) => return Door::Open,
                Err(TryRecvError::Disconnected) => return Door::Closed,
            }
        }
    }

    fn carry_out(&mut self, engine: &mut Engine, command: Command) -> Door {
        match command {
            Command::Submit { requests, taken, asked } => {
                let outcome = self.take_in(engine, requests, asked);
                let ids = outcome.as_ref().map_or_else(|_| Vec::new(), Vec::clone);
                if taken(outcome) == Sent::Gone {
                    ids.into_iter().for_each(|id| {
                        engine.abort(id);
                    });
                }
            }
            Command::AfterEvents(call) => self.after.push(call),
            Command::Abort(id) => {
                // Whoever drives the engine may have requests of its own, which no guest may end.
                if self.sinks.contains_key(&id) {
                    engine.abort(id);
                }
            }
            Command::Pause { mode, reply } => {
                let open = self.sinks.keys().copied().collect();
                self.gate.close(engine, mode, (open, reply));
            }
            Command::Resume { reply } => {
                self.gate.open(engine);
                self.report(engine);
                // A caller that has left no longer waits for the answer.
                let _left = reply.send(Ok(()));
            }
            Command::Replace { source, reply } => {
                let replaced = engine.replace_weights(&source);
                if let Err(error) = &replaced
                    && matches!(error.kind(), ErrorKind::Internal(_))
                {
                    self.broken = Some(Error::internal(error.to_string()));
                }
                self.report(engine);
                // As above.
                let _left = reply.send(replaced);
            }
            Command::Stop => return Door::Closed,
        }
        Door::Open
    }

    /// Adds all of some requests, or none where one of them is refused.
    fn take_in(
        &mut self,
        engine: &mut Engine,
        requests: Vec<(Request, Sink)>,
        asked: Instant,
    ) -> Result<Vec<RequestId>> {
        let mut ids = Vec::with_capacity(requests.len());
        for (request, sink) in requests {
            let samples = request.params.n;
            match engine.add(request) {
                Ok(id) => {
                    self.sinks.insert(id, (sink, samples));
                    self.watch.asked(id, samples, asked);
                    self.gate.entered(id);
                    ids.push(id);
                }
                Err(error) => {
                    ids.into_iter().for_each(|id| {
                        engine.abort(id);
                    });
                    return Err(error);
                }
            }
        }
        Ok(ids)
    }

    /// Hands the guests their events and returns the others. Whoever has had an event finds it counted.
    fn deliver(&mut self, engine: &mut Engine, events: Vec<Event>) -> Vec<Event> {
        self.report(engine);
        let tokens = events.iter().filter(|event| matches!(event, Event::Token(_))).count();
        self.status.lock().generated_tokens += tokens as u64;
        let (mut others, now) = (Vec::new(), Instant::now());
        for event in events {
            self.watch.event(&event, now);
            let id = event.request();
            let over = matches!(event, Event::Finished(_));
            let Some((sink, open)) = self.sinks.get_mut(&id) else {
                others.push(event);
                continue;
            };
            *open -= usize::from(over);
            let last = *open == 0;
            if sink(event) == Sent::Gone && !last {
                engine.abort(id);
            }
            if last {
                self.sinks.remove(&id);
                self.gate.left(id);
            }
        }
        self.after.retain_mut(|call| call() == Sent::Ok);
        others
    }

    fn report(&self, engine: &Engine) {
        let (running, waiting) = engine.load_counts();
        let mut status = self.status.lock();
        status.running = running;
        status.waiting = waiting;
        status.stats = engine.stats();
        status.version = engine.version();
        status.nan_logits = engine.nan_logits();
        status.speculation = engine.speculation();
        status.pause = self.gate.mode();
        status.heartbeat = Instant::now();
    }

    /// Steps begin: from here on they are expected to end.
    fn arrive(&self) {
        let mut status = self.status.lock();
        if status.phase == Phase::Away {
            status.phase = Phase::Serving;
            status.heartbeat = Instant::now();
        }
    }

    /// Whoever drives the engine turns to other work.
    fn leave(&self) {
        self.status.lock().phase = Phase::Away;
    }

    /// Says why nobody is served any more.
    pub(crate) fn fail(&self, error: &Error) {
        self.status.lock().failure = Some(error.to_string());
    }
}

/// Guests of an engine that is being driven; without it they are told that its driver is away.
struct Present<'a>(&'a mut Guests);

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// An engine with its driver's own requests and, where a service is attached, with guests.
///
/// While it exists and steps, a step that does not end is a stall ([`Status::heartbeat`]); once it is
/// dropped or gone into an update, its driver is [`Phase::Away`], however long.
///
/// ```no_run
/// # fn example(mut engine: engine::Engine) -> engine::Result<()> {
/// use engine::{Host, Service};
/// let (service, mut guests) = Service::attach(&engine);
/// // `service` goes to those who ask. Here the engine is driven:
/// let mut host = Host::new(&mut engine, Some(&mut guests));
/// let own_events = host.step()?;
/// drop(host.begin_update()?); // running guests go on afterwards
/// # Ok(())
/// # }
/// ```
pub struct Host<'a> {
    /// The engine, to add requests of one's own.
    pub engine: &'a mut Engine,
    guests: Option<Present<'a>>,
}

impl<'a> From<&'a mut Engine> for Host<'a> {
    fn from(engine: &'a mut Engine) -> Self {
        Self { engine, guests: None }
    }
}

impl<'a> Host<'a> {
    /// An engine that may have guests.
    pub fn new(engine: &'a mut Engine, guests: Option<&'a mut Guests>) -> Self {
        Self { engine, guests: guests.map(Present) }
    }

    /// The same for a shorter time.
    pub fn reborrow(&mut self) -> Host<'_> {
        let guests = self.guests.as_mut().map(|guests| Present(guests.0));
        Host { engine: self.engine, guests }
    }

    /// Whether a service is attached.
    pub fn has_guests(&self) -> bool {
        self.guests.is_some()
    }

    /// Runs one batch and returns the events of the driver's own requests, in the order of the batch.
    ///
    /// # Errors
    /// As [`Engine::step`]; with guests as [`Engine::step_contained`].
    pub fn step(&mut self) -> Result<Vec<Event>> {
        match &mut self.guests {
            Some(guests) => guests.0.step(self.engine),
            None => self.engine.step(),
        }
    }

    /// Lets the guests have the engine for about `time`; without guests only time passes. No request of
    /// the driver's own may be running.
    ///
    /// # Errors
    /// As [`Engine::step_contained`].
    pub fn serve_for(&mut self, time: Duration) -> Result<()> {
        match &mut self.guests {
            Some(guests) => guests.0.serve_for(self.engine, time),
            None => {
                std::thread::sleep(time);
                Ok(())
            }
        }
    }

    /// Exclusive access to the weights, as [`Engine::begin_update`]; guests wait through it.
    ///
    /// # Errors
    /// `ErrorKind::Busy` while requests wait or run that cannot be guests'.
    pub fn begin_update(self) -> Result<WeightsUpdate<'a>> {
        match self.guests {
            Some(_) => self.engine.begin_update_keeping(),
            None => self.engine.begin_update(),
        }
    }
}
