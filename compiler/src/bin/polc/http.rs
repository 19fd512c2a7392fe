//! The little of HTTP that metrics take: a connection is for one request, which is answered.
//!
//! Whoever may connect may also do nothing, send nonsense, or never read. So a connection has a thread of its own and a
//! time to be over in, and there is room for so many. Where one more comes the oldest that asks nothing has to go, else the
//! oldest that does not read; as long as all wait for their answers, the next one does, too: whoever asks is answered.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Connections at once; as many more may be about to end.
const CONNECTIONS_MAX: usize = 64;
/// Time that a request may take to come, and what comes behind it to be read.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// Time within which a client has to take some of its answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Time that a connection is left alone in which nobody asks or reads, though others come.
const GRACE: Duration = Duration::from_millis(250);
/// Bytes of a request, and of what is read behind it.
const REQUEST_BYTES_MAX: usize = 16 << 10;
const REST_BYTES_MAX: usize = 1 << 20;
/// Header lines of a request.
const HEADERS_MAX: usize = 64;
/// Pause after a connection that could not be accepted, and longest wait for room.
const PAUSE: Duration = Duration::from_millis(100);

/// An answer.
pub(crate) struct Answer {
    /// The status code and its words, such as `404 Not Found`.
    pub status: &'static str,
    /// Lines of the header beside those that every answer has.
    pub headers: Vec<(&'static str, &'static str)>,
    /// The text.
    pub body: String,
}

impl Answer {
    /// A text with a status.
    pub(crate) fn new(status: &'static str, body: impl Into<String>) -> Answer {
        Answer { status, headers: vec![("Content-Type", "text/plain; charset=utf-8")], body: body.into() }
    }
}

/// What answers a request, by its method and target.
pub(crate) type Answering<'a> = dyn Fn(&str, &str) -> Answer + Sync + 'a;

/// Answers whoever connects to a listener that doesn't block, until `wait`, which waits for somebody to connect, says that
/// it is over.
///
/// # Errors
/// Those of `wait`.
pub(crate) fn serve<E>(
    listener: &TcpListener,
    answer: &Answering<'_>,
    mut wait: impl FnMut() -> Result<bool, E>,
) -> Result<(), E> {
    let connections = Connections::default();
    thread::scope(|scope| {
        let result = loop {
            match wait() {
                Ok(false) => {}
                ended => break ended.map(|_| ()),
            }
            if !connections.has_room() {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    let Some(number) = connections.add(&stream) else { continue };
                    let connections = &connections;
                    let started = thread::Builder::new().spawn_scoped(scope, move || {
                        // A client that went away needs no answer.
                        let _ = converse(stream, answer, &|stage| connections.comes_to(number, stage));
                        connections.remove(number);
                    });
                    if started.is_err() {
                        connections.remove(number);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // There may be no descriptor left for it until another one ends.
                Err(_) => thread::sleep(PAUSE),
            }
        };
        connections.close();
        result
    })
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nobody looked at it yet.
    New,
    /// Its request is being waited for.
    Waiting(Instant),
    /// Its request is there.
    Asked,
    /// Its answer is there to be read.
    Told(Instant),
}

/// Connections that are open, the oldest first.
#[derive(Default)]
struct Connections {
    opened: Mutex<Opened>,
    ended: Condvar,
}

#[derive(Default)]
struct Opened {
    /// How many there were.
    count: u64,
    /// How many have not ended, though they may have been told to.
    running: usize,
    open: VecDeque<(u64, TcpStream, Stage)>,
}

impl Opened {
    /// The connection that has to go if one more comes, if one may.
    fn to_go(&self, now: Instant) -> Option<usize> {
        let is_over = |since: Instant| now.saturating_duration_since(since) >= GRACE;
        let first = |over: &dyn Fn(Stage) -> bool| self.open.iter().position(|(.., stage)| over(*stage));
        first(&|stage| matches!(stage, Stage::Waiting(since) if is_over(since)))
            .or_else(|| first(&|stage| matches!(stage, Stage::Told(since) if is_over(since))))
    }
}

impl Connections {
    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for a connection; whether there is some now. Waits a moment for it.
    fn has_room(&self) -> bool {
        let mut opened = self.opened();
        if opened.running < 2 * CONNECTIONS_MAX {
            if opened.open.len() < CONNECTIONS_MAX {
                return true;
            }
            if let Some((_, oldest, _)) =
                opened.to_go(Instant::now()).and_then(|index| opened.open.remove(index))
            {
                // Its thread ends by that.
                let _ = oldest.shutdown(Shutdown::Both);
                return true;
            }
        }
        let _ = self.ended.wait_timeout(opened, PAUSE);
        false
    }

    /// A connection's number, or none if it is gone already.
    fn add(&self, stream: &TcpStream) -> Option<u64> {
        let stream = stream.try_clone().ok()?;
        let mut opened = self.opened();
        opened.count += 1;
        opened.running += 1;
        let number = opened.count;
        opened.open.push_back((number, stream, Stage::New));
        Some(number)
    }

    fn comes_to(&self, number: u64, stage: Stage) {
        if let Some(found) = self.opened().open.iter_mut().find(|(own, ..)| *own == number) {
            found.2 = stage;
        }
    }

    fn remove(&self, number: u64) {
        let mut opened = self.opened();
        opened.running -= 1;
        opened.open.retain(|(own, ..)| *own != number);
        self.ended.notify_all();
    }

    fn close(&self) {
        for (_, stream, _) in &self.opened().open {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// What has come of a request.
enum Asked {
    /// Not all of it.
    Part,
    /// Its method and target.
    Whole(String, String),
    /// What is none, and the answer's status.
    Wrong(&'static str),
}

fn asked(bytes: &[u8]) -> Asked {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match (request.parse(bytes), request.method, request.path) {
        (Ok(httparse::Status::Complete(_)), Some(method), Some(target)) => {
            Asked::Whole(method.to_string(), target.to_string())
        }
        (Ok(_), ..) if bytes.len() < REQUEST_BYTES_MAX => Asked::Part,
        (Ok(_) | Err(httparse::Error::TooManyHeaders), ..) => {
            Asked::Wrong("431 Request Header Fields Too Large")
        }
        (Err(_), ..) => Asked::Wrong("400 Bad Request"),
    }
}

/// Reads a request and answers it, and tells how far it has come.
fn converse(mut stream: TcpStream, answer: &Answering<'_>, comes_to: &dyn Fn(Stage)) -> io::Result<()> {
    let mut bytes = Vec::new();
    comes_to(Stage::Waiting(Instant::now()));
    let until = Instant::now() + REQUEST_TIME;
    let (answer, wants_body) = loop {
        match asked(&bytes) {
            Asked::Whole(method, target) => {
                comes_to(Stage::Asked);
                break (answer(&method, &target), method != "HEAD");
            }
            Asked::Wrong(status) => break (Answer::new(status, format!("{status}\n")), true),
            Asked::Part => {}
        }
        if !read_more(&mut stream, &mut bytes, until)? {
            return Ok(());
        }
    };
    let now = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
    let length = answer.body.len();
    let mut text = format!(
        "HTTP/1.1 {}\r\nDate: {now}\r\nContent-Length: {length}\r\nConnection: close\r\n",
        answer.status
    );
    answer.headers.iter().for_each(|(name, value)| text += &format!("{name}: {value}\r\n"));
    text += "\r\n";
    text += if wants_body { &answer.body } else { "" };
    comes_to(Stage::Told(Instant::now()));
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    // To close it while something is unread would take the answer from the client (RFC 9112, section 9.6).
    let until = Instant::now() + REQUEST_TIME;
    let mut rest = Vec::new();
    while rest.len() < REST_BYTES_MAX && read_more(&mut stream, &mut rest, until)? {}
    Ok(())
}

/// Reads what comes next; whether something did in time.
fn read_more(stream: &mut TcpStream, bytes: &mut Vec<u8>, until: Instant) -> io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(false);
    }
    stream.set_read_timeout(Some(left))?;
    let mut part = [0; 4 << 10];
    let count = stream.read(&mut part)?;
    bytes.extend_from_slice(&part[..count]);
    Ok(count > 0)
}
