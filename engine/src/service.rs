//! The engine on a thread of its own, for concurrent callers.
//!
//! Callers send commands through a channel; the events of a request go to the sink that came with it.
//! A sink is called on the engine's thread and must not block: hand the event on and return.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use kernels::Dtype;
use parking_lot::Mutex;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::{GenerationDefaults, ModelConfig};
use crate::request::{Event, Request, RequestId};
use crate::text::{ChatTemplate, Tokenizer};

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
    /// When the last step, or look for work, ended.
    pub heartbeat: Instant,
    /// Set when the engine has failed and its thread ended: why.
    pub failure: Option<String>,
}

enum Command {
    Submit { request: Box<Request>, sink: Sink, reply: Sender<Result<RequestId>> },
    Abort(RequestId),
    Stop,
}

/// An engine that many threads can use at once.
pub struct Service {
    commands: Sender<Command>,
    status: Arc<Mutex<Status>>,
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
    max_model_len: usize,
    dtype: Dtype,
}

impl Service {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(engine: Engine) -> Result<Self> {
        let facts = Facts {
            model: engine.model().clone(),
            tokenizer: engine.tokenizer().cloned(),
            chat_template: engine.chat_template().cloned(),
            defaults: engine.generation_defaults().clone(),
            eos: engine.eos().to_vec(),
            max_model_len: engine.max_model_len(),
            dtype: engine.dtype(),
        };
        let status = Arc::new(Mutex::new(Status {
            running: 0,
            waiting: 0,
            stats: engine.stats(),
            generated_tokens: 0,
            heartbeat: Instant::now(),
            failure: None,
        }));
        let (commands, receiver) = unbounded();
        let worker = Worker {
            engine,
            commands: receiver,
            sinks: HashMap::new(),
            status: Arc::clone(&status),
        };
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || worker.run())
            .map_err(|e| Error::internal(format!("no thread for the engine: {e}")))?;
        Ok(Self { commands, status, thread: Some(thread), facts })
    }

    /// Takes in a request; `sink` gets all its events.
    ///
    /// # Errors
    /// What [`Engine::add`] says of the request, or that the engine has stopped.
    pub fn submit(&self, request: Request, sink: Sink) -> Result<RequestId> {
        let (reply, answer) = bounded(1);
        let gone = |_| Error::internal("the engine has stopped");
        self.commands
            .send(Command::Submit { request: Box::new(request), sink, reply })
            .map_err(|_| gone(()))?;
        answer.recv().map_err(|_| gone(()))?
    }

    /// Ends a request; its sink gets the ends of its samples. Nothing happens if it is over.
    pub fn abort(&self, id: RequestId) {
        // A stopped engine has nothing left to abort.
        let _stopped = self.commands.send(Command::Abort(id));
    }

    /// What the thread is doing.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Aborts what runs, ends the thread and gives the engine back.
    ///
    /// # Errors
    /// When the thread has panicked.
    pub fn stop(mut self) -> Result<Engine> {
        let _stopped = self.commands.send(Command::Stop);
        let thread = self.thread.take().expect("the thread is joined once");
        thread.join().map_err(|_| Error::internal("the engine's thread panicked"))
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
        self.facts.max_model_len
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

struct Worker {
    engine: Engine,
    commands: Receiver<Command>,
    sinks: HashMap<RequestId, (Sink, usize)>,
    status: Arc<Mutex<Status>>,
}

/// How long an idle thread waits before it shows that it is alive.
const IDLE: Duration = Duration::from_millis(500);

impl Worker {
    fn run(mut self) -> Engine {
        loop {
            if !self.take_commands() {
                break;
            }
            if self.engine.has_work() {
                match self.engine.step() {
                    Ok(events) => self.deliver(events),
                    Err(error) => {
                        self.status.lock().failure = Some(error.to_string());
                        break;
                    }
                }
            }
            self.report();
        }
        let open: Vec<RequestId> = self.sinks.keys().copied().collect();
        for id in open {
            self.engine.abort(id);
        }
        if let Ok(events) = self.engine.step() {
            self.deliver(events);
        }
        self.report();
        self.engine
    }

    /// Carries out what has been asked, waiting for it when there is nothing else to do. False to stop.
    fn take_commands(&mut self) -> bool {
        if !self.engine.has_work() {
            match self.commands.recv_timeout(IDLE) {
                Ok(command) => {
                    if !self.carry_out(command) {
                        return false;
                    }
                }
                Err(crossbeam::channel::RecvTimeoutError::Timeout) => return true,
                Err(crossbeam::channel::RecvTimeoutError::Disconnected) => return false,
            }
        }
        while let Ok(command) = self.commands.try_recv() {
            if !self.carry_out(command) {
                return false;
            }
        }
        true
    }

    fn carry_out(&mut self, command: Command) -> bool {
        match command {
            Command::Submit { request, sink, reply } => {
                let samples = request.params.n;
                let added = self.engine.add(*request);
                if let Ok(id) = added {
                    self.sinks.insert(id, (sink, samples));
                }
                // A caller that has left no longer waits for the answer; its sink will say so.
                let _left = reply.send(added);
            }
            Command::Abort(id) => {
                self.engine.abort(id);
            }
            Command::Stop => return false,
        }
        true
    }

    fn deliver(&mut self, events: Vec<Event>) {
        let mut generated = 0;
        for event in events {
            let id = event.request();
            let over = matches!(event, Event::Finished(_));
            generated += u64::from(!over);
            let Some((sink, open)) = self.sinks.get_mut(&id) else { continue };
            *open -= usize::from(over);
            let last = *open == 0;
            if sink(event) == Sent::Gone && !last {
                self.engine.abort(id);
            }
            if last {
                self.sinks.remove(&id);
            }
        }
        self.status.lock().generated_tokens += generated;
    }

    fn report(&self) {
        let (running, waiting) = self.engine.load_counts();
        let mut status = self.status.lock();
        status.running = running;
        status.waiting = waiting;
        status.stats = self.engine.stats();
        status.heartbeat = Instant::now();
    }
}
